"""System calls that Python's standard library lacks.

Many of them change only the calling thread, and threads that it starts later.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_PRCTL = 157


def system_call(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
    """Make system call ``number`` of x86-64 and return its result; OSError.

    Numbers are C ints: 32 bits, with the sign extended.  A buffer is passed as its address; the
    kernel may write only into a ctypes array.
    """
    # No argtypes: ctypes would take ten times as long, which is 0.1 ms of a start.
    result: int = _syscall(number, *arguments)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def prctl(option: int, *arguments: int) -> int:
    """Call prctl(2), with zeroes for missing arguments, and return its result; OSError."""
    padding = (0,) * (4 - len(arguments))
    return system_call(_PRCTL, option, *arguments, *padding)
