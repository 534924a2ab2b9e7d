"""The one way out for every line that pyvmm prints: here lines are escaped.

A line may quote a guest, a server, a kernel or a file name.  On a terminal their control
characters would be obeyed, and their line ends would begin lines that look like ours.
tests/test_one_way_out.py finds other ways out.

A ``Reporter`` is for lines about a guest that runs, at a bounded rate: a guest may make a device
complain as often as it likes, and the log must not grow with it.  No thread may wait for a reader
of the log, because the thread has guests to serve.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Callable

from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

MAX_LINE = 1000
"""Characters: their bytes fit into PIPE_BUF, which a pipe takes all of or nothing."""

MAX_LINES_AN_HOUR = 200
"""Of a ``Reporter``: a guest that complains for ever writes 5 MB a day (20 MB, if each character
takes 4 bytes)."""
MAX_LOG_BYTES = 1 << 30
"""The most that one file takes of what a guest prints or sends.  Pipes and terminals take all."""


def escape(text: str) -> str:
    """Return ``text`` on one line, with unprintable characters spelled out: control characters,
    line ends, marks that reorder text, halves of characters."""
    return text if text.isprintable() else "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def say(line: str, *, who: str = "pyvmm", end: str = "\n") -> None:
    """Print ``who: line`` on standard error, if that takes it now."""
    complain(f"{who}: {line}", end=end)


def complain(line: str, *, end: str = "\n") -> None:
    """Print ``line`` on standard error without a prefix, if that takes it now."""
    with contextlib.suppress(OSError, ValueError):
        write_text_now(sys.stderr, escape(line) + end)


def show(line: str = "") -> None:
    """Print ``line`` on standard output; OSError if that takes none."""
    stream = sys.stdout
    encoding = stream.encoding or "utf-8"
    line = escape(line).encode(encoding, "backslashreplace").decode(encoding)
    stream.write(f"{line}\n")


def echo(data: bytes, *, end: str = "\n") -> None:
    """Print lines of another program's console on standard error; ``end`` ends each line."""
    text = data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    with contextlib.suppress(OSError, ValueError):
        write_text_now(sys.stderr, end.join(map(escape, text.split("\n"))))


def end_line() -> None:
    """Begin a new line on standard output if it is a terminal: a guest may have left one open."""
    outlet = terminal_outlet()
    if outlet is not None:
        with outlet, contextlib.suppress(OSError):
            outlet.write(b"\n")


def terminal_outlet() -> Outlet | None:
    """Return an outlet to standard output, for the caller to close; None if it is no terminal."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            return Outlet(sys.stdout.fileno())
    return None


class Allowance:
    """Lets at most ``burst`` lines pass in ``period_s`` seconds, and MAX_LINES_AN_HOUR."""

    def __init__(self, burst: int, period_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        now_s = clock()
        an_hour = max(burst, MAX_LINES_AN_HOUR)
        self._windows = [[now_s, period_s, 0, burst], [now_s, 3600.0, 0, an_hour]]
        """Each: its beginning, its length in seconds, the lines that passed in it, its limit."""

    def take(self) -> bool:
        """Return True, and count the line, if one more may pass now."""
        now_s = self._clock()
        for window in self._windows:
            if now_s - window[0] >= window[1]:
                window[0], window[2] = now_s, 0
        if any(count >= limit for _, _, count, limit in self._windows):
            return False
        for window in self._windows:
            window[2] += 1
        return True


class Reporter:
    """Callable that prints ``pyvmm: <line>``; at most ``burst`` lines in ``period_s`` seconds.

    In an hour it prints MAX_LINES_AN_HOUR.  Lines over the limit, and lines for which the reader
    has no room at once, are counted.  The next line that passes, or ``close()``, tells the count.
    Control characters are escaped, because a line may quote bytes that the guest chose; a line ends
    after MAX_LINE characters.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        burst: int = 20,
        period_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._outlet: Outlet | None = None
        if (fd := _fd_of(self._stream)) is not None:
            with contextlib.suppress(OSError):
                self._outlet = Outlet(fd)
        self._allowance = Allowance(burst, period_s, clock)
        self._lock = threading.Lock()
        self._dropped = 0
        self._is_cut = False  # True if the last line was cut and has no line end

    def __call__(self, line: str) -> None:
        """Print ``line``, or count it after too many lines."""
        with self._lock:
            if not self._allowance.take():
                self._dropped += 1
                return
            self._say_dropped()
            if not self._print(line):
                self._dropped += 1

    def close(self) -> None:
        """Say how many lines were left out, if any were; idempotent.  Lines may follow."""
        with self._lock:
            self._say_dropped()
            outlet, self._outlet = self._outlet, None
            if outlet is not None:
                outlet.close()

    def descriptors(self) -> dict[int, str]:
        """Return the descriptor that was opened for the lines, with a name, if there is one."""
        return {} if self._outlet is None else self._outlet.descriptors()

    def _say_dropped(self) -> None:
        if self._dropped and self._print(f"({self._dropped} more lines like these were left out)"):
            self._dropped = 0

    def _print(self, line: str) -> bool:
        """Return True if ``line`` was printed, or if no later line ever can be."""
        text = "\n" * self._is_cut + f"pyvmm: {escape(line)[:MAX_LINE]}\n"
        try:
            if self._outlet is None:
                missing = write_text_now(self._stream, text)
            else:
                missing = _write_text(self._outlet, self._stream, text)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            # A closed standard error is no reason to stop a guest.
            return True
        self._is_cut = missing > 0
        return not missing


def write_text_now(stream: TextIO, text: str) -> int:
    """Write ``text`` without waiting; return how many bytes are left.  BlockingIOError for all."""
    fd = _fd_of(stream)
    if fd is None:
        stream.write(text)
        stream.flush()
        return 0
    with Outlet(fd) as outlet:
        return _write_text(outlet, stream, text)


def write_now(fd: int, data: bytes) -> int:
    """Write ``data`` without waiting: see ``Outlet.write``.  Do not call it while a guest runs."""
    with Outlet(fd) as outlet:
        return outlet.write(data)


def _fd_of(stream: TextIO) -> int | None:
    """Return the descriptor behind ``stream``; None if it is in memory, or closed."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _write_text(outlet: Outlet, stream: TextIO, text: str) -> int:
    data = text.encode(stream.encoding or "utf-8", "backslashreplace")
    return len(data) - outlet.write(data)


class Outlet:
    """Writes to the descriptor ``fd`` and never waits for its reader.

    O_NONBLOCK cannot just be set, because ``fd`` is shared with the shell and the programs that it
    started.  So the constructor imports and opens whatever a write needs instead: nothing is
    imported or opened while a guest runs.  With ``is_ours``, ``fd`` is non-blocking already and
    nobody shares it.
    """

    def __init__(self, fd: int, *, is_ours: bool = False) -> None:
        self._close: Callable[[], None] | None = None
        self._fd, self._own_fd = fd, -1
        self.write: Callable[[bytes], int]
        """Write some of the bytes and return how many; BlockingIOError if none, OSError."""
        mode = os.fstat(fd).st_mode
        self.write = functools.partial(os.write, fd)
        if stat.S_ISSOCK(mode):
            import socket

            own = socket.socket(fileno=os.dup(fd))
            self._close, self._own_fd = own.close, own.fileno()
            self.write = lambda data: own.send(data, socket.MSG_DONTWAIT)
        elif not is_ours and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:
                again = os.open(f"/proc/self/fd/{fd}", flags)
            except OSError:  # somebody else's terminal, say, or no descriptors are left
                is_character = stat.S_ISCHR(mode)
                self.write = lambda data: _write_where_there_is_room(
                    fd, data, 1 if is_character else len(data)
                )
            else:
                self._close, self._own_fd = functools.partial(os.close, again), again
                self.write = functools.partial(os.write, again)

    def descriptors(self) -> dict[int, str]:
        """Return the descriptor that the outlet opened, with a name, if there is one."""
        return {self._own_fd: f"write to {self._fd}"} if self._own_fd >= 0 else {}

    def close(self) -> None:
        """Close what the outlet opened, not ``fd``; idempotent.  ``write`` then raises OSError."""
        close, self._close = self._close, None
        self._own_fd = -1
        self.write = _write_after_close
        if close is not None:
            close()

    def __enter__(self) -> Outlet:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class FileLimit:
    """Writes to a file by ``write``, as ``Outlet.write`` does, until it has ``limit`` bytes.

    The last bytes are a line that says so.  Later bytes are dropped, and count as written: the
    guest goes on.
    """

    def __init__(self, write: Callable[[bytes], int], limit: int = MAX_LOG_BYTES) -> None:
        self._write = write
        self._room = limit
        self._note = f"\r\n==== pyvmm: this file takes no more than {limit} bytes ====\r\n".encode()

    def write(self, data: bytes) -> int:
        """Write some of the bytes and return how many; BlockingIOError if none, OSError."""
        if self._room <= 0:
            return len(data)
        done = self._write(data if len(data) <= self._room else data[: self._room])
        self._room -= done
        if not self._room:
            with contextlib.suppress(OSError):
                self._write(self._note)
        return done


def _write_after_close(_data: bytes) -> int:
    raise OSError(errno.EBADF, "this outlet is closed")


def _write_where_there_is_room(fd: int, data: bytes, room: int) -> int:
    """Poll before each write: a descriptor that polls writable takes ``room`` bytes."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    done = 0
    while done < len(data) and poller.poll(0):
        done += os.write(fd, data[done : done + room])
    if not done:
        raise BlockingIOError
    return done
