"""Put a thread under the filter of its kind: from then on Linux checks every system call it makes.

A thread that makes a call that its filter does not have ends the whole process by SIGSYS.  A filter
cannot be taken off, and the threads and processes that a thread starts are under its filter too.
Source: seccomp(2); Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from pyvmm.errors import HostError
from pyvmm.jail.programs import PROGRAMS

_SECCOMP = 317
_SET_MODE_FILTER = 1
_SPEC_ALLOW = 1 << 2
"""Without it Linux before 5.16 switches off speculation past stores for this thread, which makes
the guest on it slower.  The filter is no defence against such attacks, nor is that needed: every
thread of this process may read all of its memory."""
_PR_SET_NO_NEW_PRIVS = 38
_INSTRUCTION_BYTES = 8
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def enter(kind: str) -> None:
    """Put the calling thread under the filter of ``kind``, a key of ``table.KINDS``; for good.

    Sets no_new_privs for the thread too, without which Linux lets only root do this.  HostError if
    the kernel refuses; KeyError for an unknown kind.
    """
    data, places = PROGRAMS[kind]
    patched = bytearray(data)
    for place in places:
        struct.pack_into("=I", patched, place, os.getpid())
    program = _Program(len(data) // _INSTRUCTION_BYTES, bytes(patched))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _load(ctypes.byref(program)):
        raise HostError(
            f"seccomp: no filter for a thread ({kind}): {os.strerror(ctypes.get_errno())}"
        )


def why_not() -> str:
    """Return why this process can load no filter, in words; "" if it can.  Changes nothing."""
    if not _load(None) or ctypes.get_errno() == errno.EFAULT:
        return ""
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return "the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"
    return f"seccomp(2) is refused: {os.strerror(number)}; a container's own filter may do that"


def _load(program: object) -> int:
    result: int = _libc.syscall(_SECCOMP, _SET_MODE_FILTER, _SPEC_ALLOW, program)
    return result
