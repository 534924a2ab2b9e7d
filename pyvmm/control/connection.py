"""One client of the control server: its socket, its backlog, its requests under way."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyvmm.control.messages import (
    MAX_FDS,
    LineReader,
    Params,
    RequestError,
    encode,
    id_of,
    parse_request,
)
from pyvmm.run.io_loop import Deadline, IoLoop, IoSource

MAX_BACKLOG_BYTES = 2 << 20
"""While so many bytes wait for a client, none of its requests is read."""
MAX_REQUESTS = 64
"""Requests of one client that may be under way."""
MAX_LINES_A_PASS = 16
STALL_S = 60.0
"""A client that takes none of the bytes that wait for it for so long is hung up."""
_READ_BYTES = 64 << 10
_INT_BYTES = array.array("i").itemsize


class Call:
    """One request under way, which is answered once; later answers are dropped.

    ``when_over`` is called if the client goes away before the answer.
    """

    def __init__(self, connection: Connection, number: int, method: str) -> None:
        self.connection = connection
        self.id = number
        self.method = method
        self.is_over = False
        self.when_over: Callable[[], None] | None = None

    def answer(self, result: Mapping[str, object]) -> None:
        """Send ``result``."""
        self._end({"id": self.id, "result": result})

    def refuse(
        self, kind: str, message: str, more: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        """Send an error; ``more`` are fields of it that only its kind has."""
        self._end({"id": self.id, "error": {"kind": kind, "message": message, **more}})

    def forget(self) -> None:
        """The client has gone: nobody waits for an answer."""
        if not self.is_over:
            self.is_over = True
            if self.when_over is not None:
                self.when_over()

    def _end(self, message: Mapping[str, object]) -> None:
        if not self.is_over:
            self.is_over = True
            self.connection.end_call(self)
            self.connection.send(message)


class Connection:
    """A client at the connected socket ``sock``, served in the thread of ``loop``.

    ``serve`` begins a request: it raises RequestError, or answers the call sooner or later.  Only
    if it does not raise, the descriptors that it took from the parameters are its own.
    ``on_room`` is called when bytes were taken, and after an answer.  ``on_gone`` is called once,
    when the connection has ended.  An owner is never hung up for being slow.
    """

    def __init__(
        self,
        loop: IoLoop,
        sock: socket.socket,
        *,
        serve: Callable[[Call, Params], None],
        on_room: Callable[[Connection], None],
        on_gone: Callable[[Connection], None],
        is_owner: bool = False,
    ) -> None:
        sock.setblocking(False)
        self.is_owner = is_owner
        self.calls: dict[int, Call] = {}
        self.is_closed = False
        self._loop = loop
        self._socket = sock
        self._serve, self._on_room, self._on_gone = serve, on_room, on_gone
        self._lines = LineReader()
        self._fds: list[int] = []
        """Descriptors that came, and whose request is not complete yet."""
        self._out = bytearray()
        self._input = IoSource(sock.fileno(), self._read, edge_triggered=False)
        self._output = IoSource(
            sock.fileno(), self._write, edge_triggered=False, is_output=True
        )
        self._is_reading = self._is_writing = self._has_lines = False
        self._ends_after_output = False
        self._stall: Deadline | None = None
        self._look()

    # Answers and events

    def send(self, message: Mapping[str, object]) -> None:
        """Send one message, now or when the client takes it."""
        if self.is_closed:
            return
        self._out += encode(message)
        self._flush()

    @property
    def backlog(self) -> int:
        """The number of bytes that wait for the client."""
        return len(self._out)

    def end_call(self, call: Call) -> None:
        """``call`` was answered."""
        self.calls.pop(call.id, None)
        self._loop.call_soon(self._tell_room)

    def take_requests(self) -> None:
        """Begin the requests that have come, without waiting for the loop's turn."""
        self._read()

    def finish(self) -> None:
        """Take no more requests, and close the connection once all that waits is sent."""
        self._ends_after_output = True
        self._flush()

    def close(self) -> None:
        """Close the connection; idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        self._loop.remove(self._input)
        self._loop.remove(self._output)
        if self._stall is not None:
            self._stall.cancel()
        self._close_fds(self._fds)
        self._socket.close()
        calls, self.calls = list(self.calls.values()), {}
        for call in calls:
            call.forget()
        self._out.clear()
        self._on_gone(self)

    # The socket

    def _read(self) -> None:
        if self.is_closed or not self._is_reading:
            return
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(MAX_FDS * _INT_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % _INT_BYTES])
                self._fds += numbers
        if not data:
            self.close()
            return
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            self._hang_up(
                f"more than {MAX_FDS} descriptors came with a request, or this process has no room "
                "for them"
            )
            return
        self._lines.feed(data)
        self._take_lines()

    def _take_lines(self) -> None:
        """Begin the requests that are complete, while there is room for their answers."""
        self._has_lines = False
        for _ in range(MAX_LINES_A_PASS):
            if self.is_closed or self._has_too_much:
                break
            try:
                line = self._lines.next_line()
            except RequestError as error:
                self._hang_up(str(error))
                break
            if line is None:
                if self._fds and self._lines.is_between_lines:
                    self._hang_up("descriptors came that no request counts in fds")
                break
            self._begin(line)
        else:
            # There may be more lines; the other clients have their turn first.
            self._has_lines = True
            self._loop.call_soon(self._go_on)
        self._look()

    def _begin(self, line: bytes) -> None:
        try:
            request = parse_request(line)
        except RequestError as error:
            self._refuse(id_of(line), error)
            if self._fds:
                self._hang_up("descriptors came with a line that is no request")
            return
        fds, self._fds = self._fds[: request.fds], self._fds[request.fds :]
        params = Params(request.method, request.params, fds)
        try:
            if len(fds) < request.fds:
                raise RequestError(
                    "request", f"request {request.id}: {len(fds)} descriptors came, not "
                    f"{request.fds}"
                )
            if request.id in self.calls:
                raise RequestError("request", f"request {request.id} is under way already")
            if len(self.calls) >= MAX_REQUESTS:
                raise RequestError(
                    "limit", f"{MAX_REQUESTS} requests are under way; wait for an answer first"
                )
            call = Call(self, request.id, request.method)
            self.calls[request.id] = call
            try:
                self._serve(call, params)
            except RequestError:
                self.calls.pop(request.id, None)
                call.is_over = True
                raise
        except RequestError as error:
            self._close_fds(fds)
            self._refuse(request.id, error)
        else:
            self._close_fds(params.unused_fds)

    def _refuse(self, number: int | None, error: RequestError) -> None:
        self.send({"id": number, "error": {"kind": error.kind, "message": str(error)}})

    def _hang_up(self, why: str) -> None:
        """Say why, to a client with which nothing can be done any more, and close."""
        self._refuse(None, RequestError("request", f"{why}; the connection is closed"))
        self.close()

    def _write(self) -> None:
        self._flush()
        self._tell_room()

    def _tell_room(self) -> None:
        if not self.is_closed:
            self._on_room(self)

    def _flush(self) -> None:
        """Send as much as the client takes now."""
        if self.is_closed:
            return
        try:
            while self._out:
                sent = self._socket.send(memoryview(self._out)[:_READ_BYTES])
                del self._out[:sent]
                self._restart_stall()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()
            return
        if not self._out and self._ends_after_output:
            self.close()
            return
        self._look()

    @property
    def _has_too_much(self) -> bool:
        return len(self._out) >= MAX_BACKLOG_BYTES or self._ends_after_output

    def _look(self) -> None:
        """Wait for that for which there is something to do."""
        if self.is_closed:
            return
        reads = not (self._has_lines or self._has_too_much)
        writes = bool(self._out)
        if reads != self._is_reading:
            self._is_reading = reads
            (self._loop.add if reads else self._loop.remove)(self._input)
            if reads and not self._lines.is_between_lines:
                # Lines may have been left when there was no room for answers.
                self._loop.call_soon(self._go_on)
        if writes != self._is_writing:
            self._is_writing = writes
            (self._loop.add if writes else self._loop.remove)(self._output)
            self._restart_stall()

    def _go_on(self) -> None:
        if not self.is_closed:
            self._take_lines()

    def _restart_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if self._out and not (self.is_owner or self.is_closed):
            self._stall = self._loop.call_in(STALL_S, self.close)

    @staticmethod
    def _close_fds(fds: list[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        fds.clear()
