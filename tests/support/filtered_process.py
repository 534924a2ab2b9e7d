"""A process that tries every system call under a filter: ``filtered_process.py ROOT KIND``.

Prints one JSON object, the result of each call by its number: an errno, or 0.  NOT_IN_FILTER
stands for a call that would have ended the process, whose action is replaced by that errno.  The
arguments are -1, so that no call that is let through does anything.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys

NOT_IN_FILTER = 4000
"""An errno that no system call has."""
NOT_TRIED = (15, 60, 231, 335, 336)
"""rt_sigreturn, exit and exit_group end the process.  So do uretprobe and uprobe, by SIGILL, and
Linux asks no filter about them (kernel/seccomp.c)."""


def results(kind: str) -> dict[int, int]:
    """Return the result of every system call but NOT_TRIED, under the filter of ``kind``."""
    from pyvmm.jail import seccomp
    from pyvmm.jail.programs import PROGRAMS

    program, places = PROGRAMS[kind]
    kill, refuse = struct.pack("=HxxI", 6, 0x80000000), struct.pack("=HxxI", 6, 0x50000 | 4000)
    instructions = [program[at : at + 8] for at in range(0, len(program), 8)]
    assert kill in instructions
    PROGRAMS[kind] = b"".join(refuse if one == kill else one for one in instructions), places
    libc = ctypes.CDLL(None, use_errno=True)
    found: dict[int, int] = {}
    seccomp.enter(kind)
    arguments = (ctypes.c_long(-1),) * 6
    for number in (*range(480), 512, 547, 1 << 30):
        if number not in NOT_TRIED:
            ctypes.set_errno(0)
            failed = libc.syscall(number, *arguments) == -1
            found[number] = ctypes.get_errno() if failed else 0
    return found


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print(json.dumps(results(sys.argv[2])))
    sys.stdout.flush()
    os._exit(0)
