"""A machine's process that ended without a word: what ended it, and the terminal that it left."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from typing import Any

from pyvmm.console.terminal import raw_modes
from pyvmm.report import say

JAILED = (
    "the jail ended this machine: a thread made a system call that its filter does not have; "
    "please report this (docs/jail.md)"
)
_EXIT_CODE = 52 - 3  # proc(5): field 52; the first one behind the last ')' is field 3
_MODES = 6  # before the characters


def ending_signal(stat: bytes) -> int:
    """Return the signal that ended the process, from its /proc/PID/stat; 0 if none is known."""
    fields = stat.rpartition(b")")[2].split()
    if len(fields) <= _EXIT_CODE or not fields[_EXIT_CODE].isdigit():
        return 0
    return int(fields[_EXIT_CODE]) & 0x7F


def read_state(fd: int) -> bytes:
    """Return the present content of ``fd``, a /proc/PID/stat; b"" once the process is reaped."""
    with contextlib.suppress(OSError):
        return os.pread(fd, 4096, 0)
    return b""


def tell(stat: bytes, *, terminal_fd: int) -> None:
    """Say that the jail has ended the process, if it has.

    The guest may have left the cursor of ``terminal_fd`` in the midst of a line; -1 for none.
    """
    if ending_signal(stat) == signal.SIGSYS:
        if terminal_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(terminal_fd, b"\r\n")
        say(JAILED)


def restore_terminal(fd: int, modes_text: str) -> None:
    """Give the terminal ``fd`` the modes that it had (``start``), if it still has the guest's.

    Otherwise a shell has set its own by now.
    """
    numbers = list(map(int, modes_text.split()))
    before: list[Any] = [*numbers[:_MODES], [bytes([code]) for code in numbers[_MODES:]]]
    with contextlib.suppress(OSError, termios.error):
        if _numbers(termios.tcgetattr(fd)) == _numbers(raw_modes(before)):
            termios.tcsetattr(fd, termios.TCSANOW, before)


def _numbers(modes: list[Any]) -> list[int]:
    *flags, characters = modes
    return [*flags, *(one if isinstance(one, int) else one[0] for one in characters)]
