"""The one way out for every line that pyvmm prints, and it escapes.

A line may quote a guest, a server, a kernel or a file name.  On a terminal their control
characters would be obeyed, and their line ends would begin lines that look like ours.
tests/test_one_way_out.py finds other ways out.

A ``Reporter`` is for lines about a guest that runs, at a bounded rate: a guest may make a device
complain as often as it likes; the log must not grow with it.  Nor may anybody wait because nobody
reads it: whoever has a line to say has guests to serve.
"""

from __future__ import annotations

import contextlib
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
    """Return ``text`` on one line, with what is not printable spelled out: control characters, line
    ends, marks that reorder text, halves of characters."""
    return text if text.isprintable() else "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def say(line: str, *, who: str = "pyvmm", end: str = "\n") -> None:
    """Print ``who: line`` on standard error, if there is one that takes it now."""
    complain(f"{who}: {line}", end=end)


def complain(line: str, *, end: str = "\n") -> None:
    """Print ``line`` on standard error as it is, if there is one that takes it now."""
    with contextlib.suppress(OSError, ValueError):
        write_text_now(sys.stderr, escape(line) + end)


def show(line: str = "") -> None:
    """Print ``line`` on standard output; OSError if that takes none."""
    stream = sys.stdout
    encoding = stream.encoding or "utf-8"
    line = escape(line).encode(encoding, "backslashreplace").decode(encoding)
    stream.write(f"{line}\n")


def echo(data: bytes, *, end: str = "\n") -> None:
    """Print on standard error the lines of a console that somebody else has; ``end`` ends one."""
    text = data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    with contextlib.suppress(OSError, ValueError):
        write_text_now(sys.stderr, end.join(map(escape, text.split("\n"))))


def end_line() -> None:
    """Begin a new line on standard output if it is a terminal: a guest may have left one open."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            write_text_now(sys.stdout, "\n")


class Seldom:
    """Callable that passes a line on to ``report``, unless that had it less than REPEAT_S ago.

    For what a peer complains of that does the same again and again: a VMM that reconnects.
    """

    _MOST = 100  # lines that are remembered

    def __init__(
        self, report: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report = report
        self._clock = clock
        self._said_s: dict[str, float] = {}

    def __call__(self, line: str) -> None:
        """Pass ``line`` on, or not."""
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

    Lines over the limit, and those that whoever reads them has no room for at once, are counted;
    the count is said with the next line that passes, or by ``close()``.  Control characters are
    escaped, as a line may quote bytes the guest chose; it ends after MAX_LINE characters.
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
        self._burst = burst
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._window_start = clock()
        self._in_window = 0
        self._dropped = 0
        self._is_cut = False  # the last line, so that it has no end

    def __call__(self, line: str) -> None:
        """Print ``line``, or count it when too many came before it."""
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
        """Say how many lines were left out, if any were."""
        with self._lock:
            self._say_dropped()

    def _say_dropped(self) -> None:
        if self._dropped and self._print(f"({self._dropped} more lines like these were left out)"):
            self._dropped = 0

    def _print(self, line: str) -> bool:
        """Whether ``line`` was said, or nobody will ever hear one again."""
        text = "\n" * self._is_cut + f"pyvmm: {escape(line)[:MAX_LINE]}\n"
        try:
            missing = write_text_now(self._stream, text)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            # A closed standard error is no reason to stop a guest.
            return True
        self._is_cut = missing > 0
        return not missing


def write_text_now(stream: TextIO, text: str) -> int:
    """Write ``text`` without waiting; how many bytes could not be.  BlockingIOError if none."""
    try:
        fd = stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        stream.write(text)
        stream.flush()
        return 0
    data = text.encode(stream.encoding or "utf-8", "backslashreplace")
    return len(data) - write_now(fd, data)


def write_now(fd: int, data: bytes) -> int:
    """write(2) that does not wait: the number of bytes written, BlockingIOError if none.

    O_NONBLOCK cannot just be set: ``fd`` is shared with the shell and everything else it started.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        import socket

        with socket.socket(fileno=os.dup(fd)) as sock:
            return sock.send(data, socket.MSG_DONTWAIT)
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return os.write(fd, data)
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        own = os.open(f"/proc/self/fd/{fd}", flags)
    except OSError:
        # Somebody else's terminal, say.
        return _write_where_there_is_room(fd, data, 1 if stat.S_ISCHR(mode) else len(data))
    try:
        return os.write(own, data)
    finally:
        os.close(own)


def _write_where_there_is_room(fd: int, data: bytes, room: int) -> int:
    """``write_now`` by asking first: a descriptor that polls writable takes ``room`` bytes."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    done = 0
    while done < len(data) and poller.poll(0):
        done += os.write(fd, data[done : done + room])
    if not done:
        raise BlockingIOError
    return done
