"""A vhost-user back end that listens on a socket and answers as it should, but for what a test has
it do otherwise."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pyvmm.errors import PeerClosedError
from pyvmm.vhost_user.channel import Channel, Message
from pyvmm.vhost_user.protocol import (
    PROTOCOL_FEATURES,
    REPLY,
    U64,
    ProtocolFeature,
    Request,
)
from pyvmm.virtio.spec import Feature
from tests.support.patience import patient

Answer = bytes | None
"""The payload of a reply; None for no reply."""

_ALL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
OK, REFUSED = U64.pack(0), U64.pack(1)


class HangUp(Exception):  # noqa: N818 - not an error
    """Raised by an answer: the back end closes the connection."""


class LiveBackend:
    """Listens on ``socket``, and serves one front end on a thread of its own.

    ``answers`` has what to do otherwise, by request: a payload, None for no reply at all, or
    something to call with the message.  ``messages`` are those that came, in order; ``fds`` the
    file descriptors they brought, which stay open to the end, by the message's place in it.
    """

    def __init__(self, path: Path, *, protocol_features: ProtocolFeature = _ALL) -> None:
        features = int(Feature.VERSION_1 | Feature.RING_PACKED) | PROTOCOL_FEATURES
        self.answers: dict[Request, Answer | Callable[[Message], Answer]] = {
            Request.SET_OWNER: None,
            Request.GET_FEATURES: U64.pack(features),
            Request.GET_PROTOCOL_FEATURES: U64.pack(protocol_features),
            Request.SET_PROTOCOL_FEATURES: None,
            Request.GET_QUEUE_NUM: U64.pack(4),
            Request.GET_MAX_MEM_SLOTS: U64.pack(32),
            Request.GET_CONFIG: lambda message: message.payload,
            Request.GET_VRING_BASE: lambda message: message.payload,
        }
        self.messages: list[Message] = []
        self.fds: dict[int, tuple[int, ...]] = {}
        self._channel: Channel | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(patient(10))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """What was asked, by name."""
        return [message.name for message in self.messages]

    def brought_by(self, request: Request) -> list[int]:
        """The file descriptors that came with every ``request``."""
        return [
            fd
            for place, fds in self.fds.items() if self.messages[place].request == request
            for fd in fds
        ]

    def say(self, request: int, payload: bytes = b"", *, flags: int = 0) -> None:
        """Send something nobody asked for."""
        assert self._channel is not None
        self._channel.send(request, payload, flags=flags)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self._channel = channel = Channel(connection, peer="the front end")
        try:
            with contextlib.suppress(PeerClosedError, HangUp):
                while True:
                    message = channel.receive(10)
                    self.fds[len(self.messages)] = message.take_fds()
                    self.messages.append(message)
                    answer = self.answers.get(
                        Request(message.request), OK if message.need_reply else None
                    )
                    if callable(answer):
                        answer = answer(message)
                    if answer is not None:
                        channel.send(message.request, answer, flags=REPLY)
        finally:
            channel.close()

    def __enter__(self) -> LiveBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.join(patient(20))
        self._listener.close()
        for fds in self.fds.values():
            for fd in fds:
                os.close(fd)
        assert not self._thread.is_alive()


def hang_up(message: Message) -> Answer:
    """An answer that is none: the connection is closed."""
    raise HangUp
