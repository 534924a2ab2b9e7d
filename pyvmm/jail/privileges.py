"""Rights that a process gives up for good: privileges, capabilities, resources.

Each function is one step of ``jail.confine`` and changes the calling thread, and with it threads
that are started later; a few change the whole process, and say so.  All raise OSError if the kernel
lacks the step, or a sandbox around this process forbids it.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterable, Iterator

from pyvmm.jail.calls import prctl, system_call

# <linux/prctl.h>
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_MDWE = 65
_PR_MDWE_REFUSE_EXEC_GAIN = 1

# <asm/unistd_64.h>
_CAPGET, _CAPSET = 125, 126
_PERSONALITY = 135
_PRLIMIT64 = 302

_CAP_HEADER = struct.pack("=Ii", 0x2008_0522, 0)
"""struct __user_cap_header_struct: version 3, this thread."""
_CAP_DATA_BYTES = 24
"""Two struct __user_cap_data_struct: the low and the high half of three sets."""

FILE_CAPABILITIES = 0b1110
"""CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: root reads and writes all users' files."""

_READ_IMPLIES_EXEC = 0x0040_0000
_TELL_PERSONALITY = -1  # 0xffffffff

_RLIMIT = struct.Struct("=QQ")
"""struct rlimit64: the soft limit and the hard one."""
_RLIMIT_FSIZE, _RLIMIT_CORE, _RLIMIT_NOFILE = 1, 4, 7


def no_new_privileges() -> None:
    """Let no program that is executed from now on have more rights than this process.

    A set-uid program is the usual way from a user to root.  The kernel also asks for this step
    before it lets a process without privileges have a seccomp filter or a Landlock ruleset.
    """
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities(kept: int = 0) -> None:
    """Have no capability but those in the mask ``kept``: not effective, permitted, inheritable or
    ambient.

    Root without capabilities is a user who owns root's files.  A user's process has none, but for
    what a container or a file gave it.  The kernel empties the ambient set with the others.

    The bounding set stays full.  It limits only the capabilities that a program gains when it is
    executed, and ``no_new_privileges`` has it gain none.  To empty it takes 41 system calls, a
    tenth of a millisecond of a start.
    """
    data = bytes(_CAP_DATA_BYTES)
    if kept:
        found = ctypes.create_string_buffer(_CAP_DATA_BYTES)
        system_call(_CAPGET, _CAP_HEADER, found)
        permitted = kept & struct.unpack_from("=I", found, 4)[0]
        data = struct.pack("=6I", permitted, permitted, 0, 0, 0, 0)
    system_call(_CAPSET, _CAP_HEADER, data)


@contextlib.contextmanager
def capabilities_put_aside() -> Iterator[None]:
    """Have no effective capability meanwhile.  OSError.

    The kernel remembers with an open file what its opener might do.  A page map that root opens
    tells physical addresses for ever, one that was opened so tells none.
    """
    found = ctypes.create_string_buffer(_CAP_DATA_BYTES)
    system_call(_CAPGET, _CAP_HEADER, found)
    before, meanwhile = found.raw, bytearray(found.raw)
    for low_or_high in (0, 12):  # "effective" is the first of three fields
        meanwhile[low_or_high : low_or_high + 4] = bytes(4)
    system_call(_CAPSET, _CAP_HEADER, bytes(meanwhile))
    try:
        yield
    finally:
        system_call(_CAPSET, _CAP_HEADER, before)


def hide_memory() -> None:
    """Let no other process of this user read or trace this process, and let it leave no core dump.

    Its memory holds the guest's.  RLIMIT_CORE does not stop a handler that core_pattern names with
    a pipe.  A change of the uid does the same, so a run has it in any case.  The files of this
    process in /proc then belong to root.  This is for the whole process.
    """
    prctl(_PR_SET_DUMPABLE, 0)


def no_implied_code() -> None:
    """Let memory that can be read not be executable by that alone.

    A process that was started by ``setarch -X`` maps all memory executable, and the filter of
    seccomp looks only at the protection that is asked for.  Threads that exist keep their own.
    """
    personality = system_call(_PERSONALITY, _TELL_PERSONALITY)
    if personality & _READ_IMPLIES_EXEC:
        system_call(_PERSONALITY, personality & ~_READ_IMPLIES_EXEC)


def no_new_code() -> None:
    """Let no memory that was ever writable become executable (Linux 6.3).

    The filter of seccomp forbids that too, but is not there in every container.  This is for the
    whole process, and for its children.
    """
    prctl(_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN)


def limit_resources(
    kept: Iterable[int], more_files: int, largest_file_bytes: int | None
) -> None:
    """Limit core dumps, the size of files, and open files; for the whole process, for good.

    * Core dumps: none, because they hold the guest's memory and fill the host's disk.
    * Size: a write beyond ``largest_file_bytes`` of a file fails with EFBIG (Python ignores
      SIGXFSZ); None limits nothing.  Block devices are not limited.
    * Open files: besides the descriptors ``kept`` there can be ``more_files`` at one time.

    The number of processes is not limited.  The kernel counts the threads of all processes of a
    user as one number, and since Linux 6.14 KVM itself starts one at the first KVM_RUN.
    """
    _limit(_RLIMIT_CORE, 0)
    # A hard limit that is lower already cannot be raised, and stays.
    with contextlib.suppress(PermissionError):
        if largest_file_bytes is not None:
            _limit(_RLIMIT_FSIZE, largest_file_bytes)
    with contextlib.suppress(PermissionError):
        _limit(_RLIMIT_NOFILE, descriptor_limit(kept, more_files))


def descriptor_limit(kept: Iterable[int], more_files: int) -> int:
    """Return the number below which there are ``more_files`` that are not in ``kept``.

    A process may keep descriptors above its limit, and the kernel gives a new one the lowest free
    number.  So gaps between those in use count too.
    """
    taken = set(kept)
    limit = 0
    while more_files or limit in taken:
        more_files -= limit not in taken
        limit += 1
    return limit


def _limit(resource: int, limit: int) -> None:
    """Set both the soft and the hard limit."""
    system_call(_PRLIMIT64, 0, resource, _RLIMIT.pack(limit, limit), 0)
