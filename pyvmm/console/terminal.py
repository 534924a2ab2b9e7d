"""The host's terminal, while the guest has it."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import time
from collections.abc import Iterator

from pyvmm.lean import TYPE_CHECKING
from pyvmm.report import write_now

if TYPE_CHECKING:
    from typing import Any

    from pyvmm.console.queries import QueryWatch

_IUTF8 = 0x4000  # asm-generic/termbits-common.h

LOOK_S = 0.25
"""How often a run in the background looks whether it is in the foreground again: ``fg`` sends no
SIGCONT to a job that runs (bash)."""
ANSWER_S = 1.0
"""How long after a query a terminal's answer may be on its way, over a slow line too."""


class RawTerminal:
    """The terminal ``fd`` in raw mode for as long as the context lasts: each byte is the guest's.

    Only the foreground process group touches a terminal: in the background it is left alone until
    ``look`` finds the run in front (again).  ``fd`` may be no terminal; None: nothing.

    Without ``cooks_output`` what is shown is as raw as what is typed: another terminal's output.
    With it lines of ours and of others on the same terminal stay lines.
    """

    def __init__(self, fd: int | None, *, cooks_output: bool = True) -> None:
        self.fd = -1 if fd is None else fd
        self._is_terminal = fd is not None and _is_terminal(fd)
        self._cooks_output = cooks_output
        self._is_in_front = False
        self._saved: list[Any] | None = None
        self._raw: list[Any] | None = None

    def __enter__(self) -> RawTerminal:
        self.look()
        return self

    @property
    def active(self) -> bool:
        """Whether the terminal is in raw mode because of us."""
        return self._saved is not None and self._is_in_front

    @property
    def look_s(self) -> float | None:
        """In how many seconds to ``look`` again at the latest; None: there is no need."""
        return LOOK_S if self._is_terminal and not self._is_in_front else None

    def look(self) -> bool:
        """Whether a read takes nothing away from others, nor stops us: no terminal, or in front.

        Who has come to the front makes the terminal raw.
        """
        if not self._is_terminal:
            return True
        was_in_front, self._is_in_front = self._is_in_front, is_in_front(self.fd)
        if self._is_in_front and not was_in_front:
            self._make_raw()
        return self._is_in_front

    def forget(self) -> None:
        """Somebody else may have had the terminal meanwhile, as a shell does while we are stopped:
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
        """Restore the modes, and forget what was typed for the guest and is not read.

        In the background only modes that are still ours are undone: others may have set theirs.
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

    def stop_with_shell(self) -> None:
        """What SIGTSTP does, from outside: stopped, with the terminal as the shell needs it."""
        self.give_back()
        previous = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # The kernel stops the process here, unless there is no shell to continue it.
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, previous)
        self.forget()

    def __exit__(self, *_exc: object) -> None:
        self.give_back()


def settle(queries: QueryWatch, fd: int) -> None:
    """Leave nothing for the shell to read of what the terminal ``fd`` answers, as if typed, to what
    the guest has shown there.

    Waits for answers on their way, ANSWER_S after the last query at most.  What was typed
    meanwhile is forgotten with them.
    """
    if not (queries.asked_s or queries.reports or queries.may_report) or not is_in_front(fd):
        return
    with contextlib.suppress(OSError, termios.error), _not_stopped_for_it():
        last_s = queries.asked_s
        if queries.reports or queries.may_report:
            from pyvmm.console.queries import REPORTS_OFF

            with contextlib.suppress(BlockingIOError):
                write_now(fd, REPORTS_OFF)
            last_s = time.monotonic()  # reports may be on their way, as answers may
        time.sleep(max(0.0, last_s + ANSWER_S - time.monotonic()))
        termios.tcflush(fd, termios.TCIFLUSH)


def watch_queries(fd: int | None) -> QueryWatch | None:
    """A watch for the queries shown on ``fd``; None if that is no terminal."""
    if fd is None or not _is_terminal(fd):
        return None
    from pyvmm.console.queries import QueryWatch

    try:
        return QueryWatch(utf8=bool(termios.tcgetattr(fd)[0] & _IUTF8))
    except termios.error:
        return None


def is_in_front(fd: int) -> bool:
    """Whether ``fd`` is our controlling terminal, and we are its foreground process group."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False


def is_behind(fd: int) -> bool:
    """Whether ``fd`` is our controlling terminal, and we are in the background there."""
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
    """Let the calling thread change a terminal's modes without SIGTTOU, should another process
    group have come to the front a moment ago."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
