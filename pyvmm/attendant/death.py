"""A machine's process that ended without a word: what ended it, and the terminal that it left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import termios
import time
from typing import Any

from pyvmm.console.terminal import raw_modes
from pyvmm.report import say

JAILED = (
    "the jail ended this machine: a thread made a system call that its filter does not have; "
    "please report this (docs/jail.md)"
)
_SIGNAL = 0x7F  # of an exit code; wait(2)
# struct pidfd_info of linux/pidfd.h: le64 mask, 52 bytes of ids, le32 exit_code.
_PIDFD_INFO = struct.Struct("<Q52xi")
_PIDFD_GET_INFO = 0xC040_FF0B  # _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info of 64 bytes)
_PIDFD_INFO_EXIT = 8
_IS_KNOWN = 1 << 16
REAPED_S = 1.0
_PAUSE_S = 0.01
_EXIT_CODE = 52 - 3  # proc(5): field 52; the first one behind the last ')' is field 3
_MODES = 6  # before the characters


def ending_signal(first_state: bytes, state_fd: int, pidfd: int) -> int:
    """Return the signal that ended the machine's process; 0 if none has, or if it is not known.

    Only its parent is told for sure.  Until the parent has asked, /proc/PID/stat tells: there are
    ``first_state``, which was read as soon as possible, and the present one.  Recent kernels do not
    tell it of a process that hides its memory.  A pidfd does, since Linux 6.15, but only once the
    parent has asked: that may take a moment, REAPED_S at most.
    """
    code = _code_of(first_state)
    until_s = time.monotonic() + REAPED_S
    while not code:
        with contextlib.suppress(OSError):  # it is reaped
            code = _code_of(os.pread(state_fd, 4096, 0))
        with contextlib.suppress(OSError):  # it is not, or the kernel does not tell
            code = code or _code_from(pidfd)
        if code or time.monotonic() >= until_s:
            break
        time.sleep(_PAUSE_S)
    return code & _SIGNAL


def _code_of(stat: bytes) -> int:
    """Return the exit code in a /proc/PID/stat, as of wait(2); 0 if it has none."""
    fields = stat.rpartition(b")")[2].split()
    is_there = len(fields) > _EXIT_CODE and fields[_EXIT_CODE].isdigit()
    return int(fields[_EXIT_CODE]) if is_there else 0


def _code_from(pidfd: int) -> int:
    """Return the exit code of a process that was reaped; OSError if it is not known."""
    info = bytearray(_PIDFD_INFO.size)
    _PIDFD_INFO.pack_into(info, 0, _PIDFD_INFO_EXIT, 0)
    fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    mask, code = _PIDFD_INFO.unpack(info)
    # An end with status 0 is known as well: nothing else has a bit above these.
    return int(code) | _IS_KNOWN if mask & _PIDFD_INFO_EXIT else 0


def tell(number: int, *, terminal_fd: int) -> None:
    """Say that the jail has ended the process, if ``number``, the signal that did it, says so.

    The guest may have left the cursor of ``terminal_fd`` in the midst of a line; -1 for none.
    """
    if number == signal.SIGSYS:
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
