"""The host's terminal, while the guest has it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import sys
import termios
import time
from collections.abc import Callable, Iterator

from pyvmm.report import Outlet
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

_IUTF8 = 0x4000  # asm-generic/termbits-common.h

LOOK_S = 0.25
"""Seconds between two looks of a background run for the foreground.  ``fg`` sends no SIGCONT to a
job that runs (bash)."""
ANSWER_S = 1.0
"""Seconds that a terminal's answer may take after a query, over a slow line too."""
READER_S = 0.2
"""Seconds that a pipe's reader may take to show the bytes it reads."""
MOST_QUEUED_BYTES = 1 << 17
"""More than Linux queues of a terminal's output."""


class RawTerminal:
    """The terminal ``fd`` in raw mode for as long as the context lasts: each byte is the guest's.

    Only the foreground process group touches a terminal.  In the background it is left alone until
    ``look`` finds the run in front (again).  ``fd`` may be no terminal; None: nothing.

    Without ``cooks_output`` output is as raw as input: it goes to another terminal.  With it, our
    lines and other programs' on the same terminal stay lines.  The output ends at ``screen``, None
    if on no terminal.
    """

    def __init__(
        self, fd: int | None, *, cooks_output: bool = True, screen: Screen | None = None
    ) -> None:
        self.fd = -1 if fd is None else fd
        self._is_terminal = fd is not None and _is_terminal(fd)
        self._cooks_output = cooks_output
        self._screen = screen
        self._is_in_front = False
        self._saved: list[Any] | None = None
        self._raw: list[Any] | None = None

    def __enter__(self) -> RawTerminal:
        self.look()
        return self

    @property
    def active(self) -> bool:
        """True if the terminal is in raw mode because of us."""
        return self._saved is not None and self._is_in_front

    @property
    def look_s(self) -> float | None:
        """Seconds until the next ``look`` at the latest; None: there is no need."""
        return LOOK_S if self._is_terminal and not self._is_in_front else None

    def look(self) -> bool:
        """True if we may read: it is no terminal, or we are in front.

        Otherwise a read would take input away from other programs, or stop us.  If the run has come
        to the front, make the terminal raw.
        """
        if not self._is_terminal:
            return True
        was_in_front, self._is_in_front = self._is_in_front, is_in_front(self.fd)
        if self._is_in_front and not was_in_front:
            self._make_raw()
            if self._screen is not None:
                self._screen.resume()
        return self._is_in_front

    def forget(self) -> None:
        """Note that another program may have had the terminal, such as a shell while we are
        stopped.

        ``look`` then takes it anew."""
        self._is_in_front = False

    def _make_raw(self) -> None:
        with contextlib.suppress(OSError, termios.error), _not_stopped_for_it():
            now = termios.tcgetattr(self.fd)
            if self._saved is not None and now == self._raw:
                return  # nobody else had it
            raw = termios.tcgetattr(self.fd)
            raw[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
                        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON)
            if not self._cooks_output:
                raw[1] &= ~termios.OPOST
            raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG
                        | termios.IEXTEN)
            raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
            # TCSANOW, here and below: TCSADRAIN waits for ever if the terminal was stopped.
            termios.tcsetattr(self.fd, termios.TCSANOW, raw)
            self._saved, self._raw = now, termios.tcgetattr(self.fd)

    def give_back(self) -> None:
        """Restore the modes, and discard input for the guest that is not read.

        In the background only modes that are still ours are undone: another program may have set
        its own.
        """
        saved, self._saved = self._saved, None
        if saved is None:
            return
        # The terminal may have gone away meanwhile; then there is nothing to restore.
        with contextlib.suppress(OSError, termios.error), _not_stopped_for_it():
            if is_in_front(self.fd):
                termios.tcflush(self.fd, termios.TCIFLUSH)
                termios.tcsetattr(self.fd, termios.TCSANOW, saved)
                termios.tcflush(self.fd, termios.TCIFLUSH)
            elif termios.tcgetattr(self.fd) == self._raw:
                termios.tcsetattr(self.fd, termios.TCSANOW, saved)

    def stop_with_shell(self, is_off: Callable[[], bool] = lambda: False) -> None:
        """Stop as by SIGTSTP from outside, with the terminal as the shell needs it.

        Do not stop if ``is_off()`` is true after the wait for answers, up to a second: a SIGCONT
        came meanwhile.
        """
        if self._screen is not None:
            self._screen.settle()
        if is_off():
            self.forget()
            return
        self.give_back()
        previous = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # The kernel stops the process here, unless there is no shell to continue it.
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, previous)
        self.forget()

    def __exit__(self, *_exc: object) -> None:
        self.give_back()


class Screen:
    """The terminal where console output ends and where the guest's queries are answered as if
    typed.

    It is behind ``output_fd``.  None means our controlling terminal, where the reader of a pipe may
    show the output."""

    def __init__(self, output_fd: int | None) -> None:
        from pyvmm.console.queries import REPORTS_OFF, QueryWatch

        self._output_fd = output_fd
        self._reports_off = REPORTS_OFF
        # Opened now, because nothing is while a guest runs.
        self._own_fd = _open_controlling_terminal() if output_fd is None else -1
        self._fd = self._own_fd if output_fd is None else output_fd
        self._outlet = Outlet(self._fd, is_ours=output_fd is None)
        try:
            is_utf8 = bool(termios.tcgetattr(self._fd)[0] & _IUTF8)
        except termios.error:
            self.close()
            raise
        self.queries = QueryWatch(utf8=is_utf8)
        """Must be fed all output."""
        self._is_quiet = False

    @classmethod
    def behind(cls, fd: int | None) -> Screen | None:
        """Return the screen behind output to ``fd``; None if no terminal is known to be there."""
        if fd is None:
            return None
        try:
            if _is_terminal(fd):
                return cls(fd)
            mode = os.fstat(fd).st_mode
            return cls(None) if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None
        except (OSError, termios.error):
            return None

    def settle(self) -> None:
        """Leave the shell no answer or report of the terminal to read.

        Waits for answers on their way, ANSWER_S after the last query at most, and discards them
        with everything typed meanwhile.  A query that the terminal has not read by then is taken
        back, with all output that waits.  For a pseudo terminal there is no other way to tell what
        it has read.
        """
        queries = self.queries
        reports = bool(queries.reports or queries.may_report)
        if not (queries.asked_s or reports):
            return
        fd = self._fd
        with contextlib.suppress(OSError, termios.error), _not_stopped_for_it():
            if not is_in_front(fd):
                return
            last_s = queries.asked_s
            if reports:
                if self._output_fd is None:
                    time.sleep(READER_S)
                self._is_quiet = True
                with contextlib.suppress(BlockingIOError):
                    self._outlet.write(self._reports_off)
                last_s = time.monotonic()  # a report may be on its way, like an answer
            time.sleep(max(0.0, last_s + ANSWER_S - time.monotonic()))
            if not is_in_front(fd):
                return
            if queries.bytes_since < (_queued_bytes(fd) or MOST_QUEUED_BYTES):
                termios.tcflush(fd, termios.TCOFLUSH)
            termios.tcflush(fd, termios.TCIFLUSH)

    def resume(self) -> None:
        """Switch on again the reports that ``settle`` has switched off."""
        was_quiet, self._is_quiet = self._is_quiet, False
        modes = b"".join(b"\x1b[?%dh" % mode for mode in sorted(self.queries.reports))
        if was_quiet and modes:
            with contextlib.suppress(OSError):
                self._outlet.write(modes)

    def close(self) -> None:
        """Close what was opened for it; idempotent."""
        self._outlet.close()
        fd, self._own_fd = self._own_fd, -1
        if fd >= 0:
            os.close(fd)


def _open_controlling_terminal() -> int:
    return os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)


def _queued_bytes(fd: int) -> int:
    """Return the number of bytes that wait for a serial line; 0 for any pseudo terminal."""
    return int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def is_in_front(fd: int) -> bool:
    """True if ``fd`` is our controlling terminal, and we are its foreground process group."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False


def is_behind(fd: int) -> bool:
    """True if ``fd`` is our controlling terminal, and we are in the background there."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        return False


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


@contextlib.contextmanager
def _not_stopped_for_it() -> Iterator[None]:
    """Let the calling thread change a terminal's modes without SIGTTOU.

    That signal would come if another process group had come to the front a moment ago.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
