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

REPEAT_S = 60.0


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
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            write_text_now(sys.stdout, "\n")


class RepeatFilter:
    """Callable that passes a line to ``report`` unless the same line went there under REPEAT_S ago.

    For complaints about a peer that repeats itself, such as a VMM that keeps reconnecting.
    """

    _MOST = 100  # lines whose time is kept

    def __init__(
        self, report: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report = report
        self._clock = clock
        self._said_s: dict[str, float] = {}

    def __call__(self, line: str) -> None:
        """Pass ``line`` to ``report``, unless it is a repetition."""
        now_s = self._clock()
        said_s = self._said_s.get(line)
        if said_s is None or now_s - said_s >= REPEAT_S:
            self._report(line)
            self._said_s.pop(line, None)
            if len(self._said_s) >= self._MOST:
                del self._said_s[next(iter(self._said_s))]
            self._said_s[line] = now_s


class Reporter:
    """Callable that prints ``pyvmm: <line>``; at most ``burst`` lines in ``period_s`` seconds.

    Lines over the limit, and lines for which the reader has no room at once, are counted.  The
    next line that passes, or ``close()``, tells the count.  Control characters are escaped, because
    a line may quote bytes that the guest chose; a line ends after MAX_LINE characters.
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
        self._burst = burst
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._window_start = clock()
        self._in_window = 0
        self._dropped = 0
        self._is_cut = False  # True if the last line was cut and has no line end

    def __call__(self, line: str) -> None:
        """Print ``line``, or count it after too many lines."""
        with self._lock:
            now = self._clock()
            if now - self._window_start >= self._period_s:
                self._window_start, self._in_window = now, 0
            self._in_window += 1
            if self._in_window > self._burst:
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
        self.write: Callable[[bytes], int]
        """Write some of the bytes and return how many; BlockingIOError if none, OSError."""
        mode = os.fstat(fd).st_mode
        self.write = functools.partial(os.write, fd)
        if stat.S_ISSOCK(mode):
            import socket

            own = socket.socket(fileno=os.dup(fd))
            self._close = own.close
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
                self._close = functools.partial(os.close, again)
                self.write = functools.partial(os.write, again)

    def close(self) -> None:
        """Close what the outlet opened, not ``fd``; idempotent.  ``write`` then raises OSError."""
        close, self._close = self._close, None
        self.write = _write_after_close
        if close is not None:
            close()

    def __enter__(self) -> Outlet:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


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
