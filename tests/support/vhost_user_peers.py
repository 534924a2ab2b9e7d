"""What a vhost-user test needs of both sides: a channel with a raw socket at the other end, and a
back end of a few lines that answers whatever it is told to."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from typing import Any

from pyvmm.vhost_user.channel import Channel, Message
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.protocol import (
    HEADER,
    PROTOCOL_FEATURES,
    REPLY,
    U64,
    VERSION,
    ProtocolFeature,
    Request,
)

ALL_PROTOCOL_FEATURES = (1 << 17) - 1
PEER = "/run/peer.sock"
TIMEOUT_S = 0.05


def open_fds() -> int:
    """How many file descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def raw_message(
    request: int, payload: bytes = b"", *, flags: int = VERSION, size: int | None = None
) -> bytes:
    """The bytes of a message; ``size`` is a lie about its payload."""
    return HEADER.pack(request, flags, len(payload) if size is None else size) + payload


def send_raw(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send ``data`` as it is, with ``fds``."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


class ScriptedBackend:
    """A back end that has said all it will say before it is asked.

    What a front end sends is only looked at afterwards, so there is no second thread, and no
    order in which a test could hang.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.sock = ours
        self.channel = Channel(theirs, peer=PEER)
        self._reader = Channel(ours)

    def say(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Answer ``request`` with ``payload``."""
        send_raw(self.sock, raw_message(request, payload, flags=VERSION | REPLY), fds)

    def say_number(self, request: int, number: int) -> None:
        """Answer ``request`` with a u64."""
        self.say(request, U64.pack(number))

    def acknowledge(self, *requests: int, status: int = 0) -> None:
        """Say of each of ``requests`` that it was done, or how not."""
        for request in requests:
            self.say_number(request, status)

    def shake_hands(
        self,
        *,
        features: int = 0,
        protocol_features: int | None = ALL_PROTOCOL_FEATURES,
        queues: int = 4,
        mem_slots: int = 32,
    ) -> None:
        """The answers of a handshake; ``protocol_features`` None: it has none of them."""
        if protocol_features is None:
            self.say_number(Request.GET_FEATURES, features)
            return
        self.say_number(Request.GET_FEATURES, features | PROTOCOL_FEATURES)
        self.say_number(Request.GET_PROTOCOL_FEATURES, protocol_features)
        if protocol_features & ProtocolFeature.MQ:
            self.say_number(Request.GET_QUEUE_NUM, queues)
        if protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            self.say_number(Request.GET_MAX_MEM_SLOTS, mem_slots)

    def heard(self) -> list[Message]:
        """The messages that have come since the last call; their file descriptors are the
        caller's."""
        messages = []
        while message := self._reader.poll():
            messages.append(message)
        return messages

    def said(self) -> list[str]:
        """What ``heard`` says, as text: names and payloads, * for each file descriptor, ? where
        an acknowledgement is wanted."""
        texts = []
        for message in self.heard():
            marks = "*" * len(message.fds) + "?" * message.need_reply
            texts.append(f"{message.name}{marks} {message.payload.hex()}".strip())
            message.close_fds()
        return texts

    def hang_up(self) -> None:
        """Close the connection."""
        self._reader.close()

    def close(self) -> None:
        """Close both ends; idempotent."""
        self._reader.close()
        self.channel.close()

    def __enter__(self) -> ScriptedBackend:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def connected(peer: ScriptedBackend, **answers: Any) -> Frontend:
    """A front end that has shaken hands with ``peer``, whose ``answers`` those were.

    It waits TIMEOUT_S for a reply, and twice as long for a queue to stop.
    """
    peer.shake_hands(**answers)
    frontend = Frontend(peer.channel, timeout_s=TIMEOUT_S, stop_timeout_s=2 * TIMEOUT_S)
    peer.said()
    return frontend
