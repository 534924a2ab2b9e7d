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
from pyvmm.jail import privileges
from pyvmm.jail.calls import system_call
from pyvmm.jail.programs import PROGRAMS

_SECCOMP = 317
_SET_MODE_FILTER = 1
_SPEC_ALLOW = 1 << 2
"""Without it, Linux before 5.16 switches off speculation past stores for the thread, which slows
the guest down.  A filter is no defence against attacks by speculation in any case: all threads of
this process may read all of its memory."""
_INSTRUCTION_BYTES = 8
_PROGRAM = struct.Struct("=H6xQ")
"""struct sock_fprog: the number of instructions, and their address."""


def enter(kind: str) -> None:
    """Put the calling thread under the filter of ``kind``, a key of ``table.KINDS``; for good.

    Sets no_new_privs for the thread too, without which only root may do this.  HostError if the
    kernel refuses; KeyError for an unknown kind.
    """
    try:
        privileges.no_new_privileges()
    except OSError as error:
        raise _refused(kind, error) from error
    load(kind)


def load(kind: str) -> None:
    """Do the same as ``enter`` for a thread that has no_new_privs already, from its process.

    It makes one system call: around each one a thread waits for Python's lock, and every vCPU for
    that thread.
    """
    data, pid_places = PROGRAMS[kind]
    program = ctypes.create_string_buffer(data, len(data))
    for place in pid_places:
        struct.pack_into("=I", program, place, os.getpid())
    header = _PROGRAM.pack(len(data) // _INSTRUCTION_BYTES, ctypes.addressof(program))
    try:
        system_call(_SECCOMP, _SET_MODE_FILTER, _SPEC_ALLOW, header)
    except OSError as error:
        raise _refused(kind, error) from error


def _refused(kind: str, error: OSError) -> HostError:
    return HostError(f"no filter for the system calls of a thread ({kind}): {error.strerror}")


def why_not() -> str:
    """Return why this process can have no filters, in words; "" if it can.  Changes nothing."""
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except ValueError:
        return "they know the system calls of the GNU C library only"
    try:
        # Linux looks at the flags, then for the program, and only then at anything else.
        system_call(_SECCOMP, _SET_MODE_FILTER, _SPEC_ALLOW, 0)
    except OSError as error:
        if error.errno == errno.EFAULT:
            return ""
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            return "the kernel has no filters of system calls (CONFIG_SECCOMP_FILTER)"
        return f"seccomp(2) is refused: {error.strerror}; the filter of a container may do that"
    return ""
