"""Move bytes between host file descriptors and the lab's ports, one small step at a time.

A pump waits for exactly one thing: bytes from its source, or, while it holds some, room in its
sink.  So nothing here blocks, and a slow reader of CMD's output slows CMD, not the lab.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable

READ_BYTES = 1 << 16
WRITE_BYTES = select.PIPE_BUF
"""A pipe that polls writable takes so many bytes without blocking."""

ESCAPE_KEY = 0x1D  # Ctrl-]
ESCAPE_PRESSES = 3


class Source:
    """The reading half: ``take`` gets the bytes that arrive; ``ended`` is True after the last."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.ended = False

    def waiting_for(self) -> tuple[int, bool] | None:
        """The file descriptor that the next ``step`` needs, and whether to write; None: nothing."""
        return None if self.ended else (self.fd, False)

    def step(self) -> None:
        """Read once."""
        try:
            data = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # A killed QEMU resets its sockets, a vanished terminal gives EIO: both are the end.
            data = b""
        if data:
            self.take(data)
        else:
            self.end()

    def take(self, data: bytes) -> None:
        """Handle ``data`` that arrived; never empty."""
        raise NotImplementedError

    def end(self) -> None:
        """Handle the end of the source."""
        self.ended = True


class Lines(Source):
    """Calls ``handle`` with each whole line, decoded, without its newline."""

    def __init__(self, fd: int, handle: Callable[[str], None]) -> None:
        super().__init__(fd)
        self._handle = handle
        self._part = b""

    def take(self, data: bytes) -> None:
        """Split into lines; bytes after the last newline wait for the next read."""
        *lines, self._part = (self._part + data).split(b"\n")
        for line in lines:
            self._handle(line.decode("utf-8", "replace"))


class Signals(Source):
    """Calls ``handle`` with each signal number that ``signal.set_wakeup_fd`` wrote."""

    def __init__(self, fd: int, handle: Callable[[int], None]) -> None:
        super().__init__(fd)
        self._handle = handle

    def take(self, data: bytes) -> None:
        """Handle the signals, one a byte."""
        for number in data:
            self._handle(number)


class Tail(Source):
    """Keeps the last ``LIMIT`` bytes, and gives all of them to ``echo`` if there is one."""

    LIMIT = 1 << 14

    def __init__(self, fd: int, echo: Callable[[bytes], None] | None = None) -> None:
        super().__init__(fd)
        self._echo = echo
        self._kept = b""

    def take(self, data: bytes) -> None:
        """Keep and copy."""
        self._kept = (self._kept + data)[-self.LIMIT :]
        if self._echo is not None:
            self._echo(data)

    def lines(self, count: int) -> list[str]:
        """Return the last ``count`` lines that are not blank."""
        text = self._kept.decode("utf-8", "replace").replace("\r", "")
        return [line for line in text.split("\n") if line.strip()][-count:]


class Pump(Source):
    """Moves bytes from source to sink, in order, and holds at most one read's worth of them."""

    def __init__(self, fd: int, sink_fd: int) -> None:
        super().__init__(fd)
        self.pending = b""
        self.shown: Callable[[bytes], None] | None = None
        """Gets the bytes that the sink has taken."""
        self._sink_fd = sink_fd

    def waiting_for(self) -> tuple[int, bool] | None:
        """The sink while bytes are pending, then the source."""
        if self.pending:
            return self._sink_fd, True
        return super().waiting_for()

    def step(self) -> None:
        """Write once if bytes are pending, else read once."""
        if not self.pending:
            super().step()
            return
        try:
            done = os.write(self._sink_fd, self.pending[:WRITE_BYTES])
        except BlockingIOError:
            return
        except OSError as error:
            self.pending = b""
            self.ended = True
            self.sink_failed(error)
            return
        if self.shown is not None:
            self.shown(self.pending[:done])
        self.pending = self.pending[done:]

    def take(self, data: bytes) -> None:
        """Hold ``data`` for the sink."""
        self.pending = data

    def sink_failed(self, error: OSError) -> None:
        """Handle a sink that takes no more; the pump has ended."""


class Output(Pump):
    """Copies a port of the lab to a host descriptor, until ``end_mark`` comes by.

    ``hangup`` is called if the host side takes no more.
    """

    def __init__(
        self, fd: int, sink_fd: int, end_mark: bytes, hangup: Callable[[OSError], None]
    ) -> None:
        super().__init__(fd, sink_fd)
        self._end_mark = end_mark
        self._hangup = hangup
        self._held = b""
        self._sink_lost = False

    @property
    def complete(self) -> bool:
        """True if everything was delivered, or nobody wants it."""
        return self.ended and not self.pending

    def take(self, data: bytes) -> None:
        """Hold the bytes that are certainly not (the beginning of) the end mark."""
        self.pending, self._held, at_end = split_at_mark(self._held + data, self._end_mark)
        if at_end:
            self.ended = True

    def end(self) -> None:
        """Handle the lab's death: bytes that looked like a mark were none."""
        super().end()
        self.pending, self._held = self._held, b""

    def sink_failed(self, error: OSError) -> None:
        """Let CMD know, as a pipe without a reader would."""
        self._hangup(error)


def split_at_mark(data: bytes, mark: bytes) -> tuple[bytes, bytes, bool]:
    """Return ``(before, held, found)``: bytes in front of ``mark``; a tail that may begin it."""
    before, found, _ = data.partition(mark)
    if found:
        return before, b"", True
    for size in range(min(len(mark) - 1, len(data)), 0, -1):
        if data.endswith(mark[:size]):
            return data[:-size], data[-size:], False
    return data, b"", False


class Input(Pump):
    """Copies standard input to a port, and passes its end on."""

    def __init__(self, fd: int, port: socket.socket) -> None:
        super().__init__(fd, port.fileno())
        self._port = port

    def end(self) -> None:
        """Pass the end on at once: nothing is pending when a read finds it."""
        super().end()
        with contextlib.suppress(OSError):
            self._port.shutdown(socket.SHUT_WR)


class Keyboard(Pump):
    """Copies a raw terminal to the lab's terminal; Ctrl-] three times in a row calls ``escape``.

    It is read only while ``may_read()``: in the background it is the shell's.
    """

    def __init__(
        self,
        fd: int,
        port: socket.socket,
        escape: Callable[[], None],
        may_read: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(fd, port.fileno())
        self._escape = escape
        self._may_read = may_read
        self._presses = 0

    def waiting_for(self) -> tuple[int, bool] | None:
        """See ``Pump.waiting_for``; None while the terminal is somebody else's."""
        return super().waiting_for() if self.pending or self._may_read() else None

    def step(self) -> None:
        """See ``Pump.step``; nothing while the terminal is somebody else's."""
        if self.pending or self._may_read():
            super().step()

    def take(self, data: bytes) -> None:
        """Count, and pass on: a single Ctrl-] belongs to CMD."""
        super().take(data)
        for byte in data:
            self._presses = self._presses + 1 if byte == ESCAPE_KEY else 0
            if self._presses == ESCAPE_PRESSES:
                self._escape()


def describe(error: OSError) -> str | None:
    """Return words for the user about a sink that failed; None for a reader that simply left."""
    return None if error.errno == errno.EPIPE else error.strerror
