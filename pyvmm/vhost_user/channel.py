"""The socket on which vhost-user messages travel.

``Channel`` cuts the stream into messages.  Their meaning is the business of its users.

The peer is not trusted.  Each of its mistakes is one ``VhostUserError`` that names the socket and
the message, and every file descriptor that it had sent along is closed.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from pyvmm.errors import PeerClosedError, VhostUserError
from pyvmm.peers.wait_limit import WaitLimit
from pyvmm.vhost_user.protocol import (
    HEADER,
    MAX_FDS,
    MAX_PAYLOAD,
    NEED_REPLY,
    REPLY,
    VERSION,
    VERSION_MASK,
    Request,
)

# O_NONBLOCK is not enough: the sender of the socket (SET_BACKEND_REQ_FD) can clear it again.
_SEND_FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
_RECEIVE_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT


class Message:
    """One message as it arrived.

    ``request`` may be an unknown number; ``name`` is for people.  ``fds`` belong to the message
    until ``take_fds``.  The handler of a message calls ``close_fds`` at the end in any case.
    """

    __slots__ = ("fds", "flags", "name", "payload", "request")

    def __init__(
        self, request: int, flags: int, payload: bytes, fds: tuple[int, ...], name: str
    ) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = fds
        self.name = name

    @property
    def is_reply(self) -> bool:
        """True if the message answers a request."""
        return bool(self.flags & REPLY)

    @property
    def need_reply(self) -> bool:
        """True if the sender asks for an acknowledgement; counts only with REPLY_ACK."""
        return bool(self.flags & NEED_REPLY)

    def take_fds(self) -> tuple[int, ...]:
        """Return the file descriptors, which are the caller's from now on."""
        fds, self.fds = self.fds, ()
        return fds

    def close_fds(self) -> None:
        """Close every file descriptor that nobody took; idempotent."""
        _close_all(self.take_fds())


class Channel:
    """Messages over ``sock``, a connected Unix stream socket, which it owns.

    Errors call the socket ``peer``, and the process at its other end ``who``.  ``requests`` gives
    the numbers of messages their names.  After an error the channel is out of step: every later
    call raises the same error.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        peer: str = "vhost-user socket",
        who: str = "the peer",
        requests: type[enum.IntEnum] = Request,
    ) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self.peer = peer
        self._who = who
        self._requests = requests
        self._failure: VhostUserError | None = None
        self._limit = WaitLimit()
        # The message that is arriving.
        self._header: tuple[int, int, int] | None = None
        self._data = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        """The socket, to wait on; -1 once closed."""
        return self._socket.fileno()

    @property
    def is_mid_message(self) -> bool:
        """True if a part of a message has arrived, and the rest has not."""
        return self._header is not None or bool(self._data)

    def name_of(self, request: int) -> str:
        """Return the name of ``request``, or its number if it has none."""
        try:
            return self._requests(request).name
        except ValueError:
            return f"request {request}"

    def error(self, problem: str) -> VhostUserError:
        """Return an error that names this peer; the channel goes on."""
        return VhostUserError(self.peer, problem)

    def fail(self, problem: str, kind: type[VhostUserError] = VhostUserError) -> VhostUserError:
        """Return an error that names this peer, and raise it at every later call."""
        self._drop_fds()
        self._failure = kind(self.peer, problem)
        return kind(self.peer, problem)  # the one that is kept has no traceback

    def hang_up(self, problem: str) -> None:
        """``fail``, and make the socket readable, so that a thread waiting for it notices."""
        self.fail(problem)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def unpack(self, message: Message, layout: struct.Struct) -> tuple[Any, ...]:
        """Return the payload of ``message`` as ``layout``; VhostUserError unless it has that
        size."""
        if len(message.payload) != layout.size:
            raise self.error(
                f"{message.name}: payload of {len(message.payload)} bytes, not {layout.size}"
            )
        return layout.unpack(message.payload)

    # Sending

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        """Send one message whole; ``flags`` are REPLY and NEED_REPLY.

        ``fds`` stay the caller's.  A peer that does not read has ``timeout_s`` to make room; then
        it is a VhostUserError.  PeerClosedError if it has hung up.
        """
        self._check()
        deadline_s = time.monotonic() + timeout_s
        name = self.name_of(request)
        data = memoryview(HEADER.pack(request, flags | VERSION, len(payload)) + payload)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            try:
                sent = self._socket.sendmsg([data], ancillary, _SEND_FLAGS)
            except BlockingIOError:
                if not self._wait(select.POLLOUT, deadline_s):
                    raise self.fail(f"{name}: {self._who} does not read what it is sent") from None
            except (BrokenPipeError, ConnectionResetError):
                raise self.fail(
                    f"{self._who} has hung up, before {name}", PeerClosedError
                ) from None
            except OSError as error:
                raise self.fail(f"{name} cannot be sent: {error}") from error
            else:
                data, ancillary = data[sent:], []

    # Receiving

    def receive(self, timeout_s: float, *, what: str = "") -> Message:
        """Return the next message, which has ``timeout_s`` to arrive whole.

        VhostUserError if it does not come or is malformed; its text names the message as ``what``.
        PeerClosedError if the peer has hung up.
        """
        began_s = time.monotonic()
        while (message := self.poll(what=what)) is None:
            if not self._wait(select.POLLIN, began_s + timeout_s):
                part = " whole" if self.is_mid_message else ""
                due = what or "a message"
                waited_s = min(timeout_s, max(0.0, self._limit.latest_s - began_s))
                raise self.fail(f"{due} did not come{part} within {waited_s:.3g} s")
        return message

    def poll(self, *, what: str = "") -> Message | None:
        """Return the next message if all of it is here; else keep what has come, and never wait.

        Errors are those of ``receive``.
        """
        self._check()
        if self._header is None:
            if not self._fill(HEADER.size, what):
                return None
            request, flags, size = self._header = HEADER.unpack(self._data)
            self._data = bytearray()
            if flags & VERSION_MASK != VERSION:
                raise self.fail(
                    f"{self.name_of(request)}: protocol version {flags & VERSION_MASK},"
                    f" not {VERSION}"
                )
            if size > MAX_PAYLOAD:
                raise self.fail(
                    f"{self.name_of(request)}: payload of {size} bytes, the limit is {MAX_PAYLOAD}"
                )
        request, flags, size = self._header
        if not self._fill(size, what):
            return None
        message = Message(
            request, flags, bytes(self._data), tuple(self._fds), self.name_of(request)
        )
        self._header, self._data, self._fds = None, bytearray(), []
        return message

    def _fill(self, size: int, what: str) -> bool:
        """True if ``size`` bytes of the arriving message are here, after a look at the socket.

        It never reads beyond them, because the next message may bring file descriptors of its own.
        """
        while (missing := size - len(self._data)) > 0:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    missing, socket.CMSG_SPACE(MAX_FDS * 4), _RECEIVE_FLAGS
                )
            except BlockingIOError:
                return False
            except ConnectionResetError:
                data, ancillary, flags = b"", [], 0
            except OSError as error:
                raise self.fail(f"{what or 'a message'} cannot be received: {error}") from error
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds = array.array("i")
                    fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                    self._fds += fds
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
                raise self.fail(
                    f"{what or 'a message'}: more file descriptors than {MAX_FDS}, or than this"
                    " process can open"
                )
            if not data:
                due = f", {what} was due" if what else ""
                part = " in the middle of a message" if self.is_mid_message else ""
                raise self.fail(f"{self._who} has hung up{part}{due}", PeerClosedError)
            self._data += data
        return True

    def limit_waits(self, latest_s: float) -> None:
        """Let no wait last beyond ``latest_s`` (time.monotonic), current ones included.

        From any thread, until ``close``.
        """
        self._limit.set(latest_s)

    def _wait(self, event: int, deadline_s: float) -> bool:
        """Sleep until ``event`` or the deadline; False if that has passed."""
        return self._limit.wait(self._socket.fileno(), event, deadline_s)

    # Ends

    def _check(self) -> None:
        """Raise the earlier error once more, if there was one."""
        if self._failure is not None:
            raise type(self._failure)(self._failure.peer, self._failure.problem)

    def _drop_fds(self) -> None:
        fds, self._fds = self._fds, []
        _close_all(fds)

    def close(self) -> None:
        """Hang up; idempotent.  Calls after it are errors."""
        if self._failure is None:
            self._failure = self.error("the connection is closed")
        self._drop_fds()
        self._socket.close()
        self._limit.close()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
