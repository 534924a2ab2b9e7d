"""This process's page map, which tells the pages of its memory that hold something (``pages.py``).

Apart from that, because a machine that may be saved opens it at its start.
"""

from __future__ import annotations

import contextlib
import os

from pyvmm.errors import HostError
from pyvmm.memory import GuestMemory


def keep_pagemap(memory: GuestMemory) -> None:
    """Open the page map for ``pages.own_runs``, because a jailed process cannot; HostError.

    It tells no physical addresses, also if root opens it.  ``memory`` closes it.  Nothing to do for
    shared memory, which has no own pages.
    """
    if memory.fd is None and memory.pagemap_fd is None:
        from pyvmm.jail.privileges import capabilities_put_aside  # only a machine that is saved

        with contextlib.ExitStack() as stack:
            # A sandbox may refuse it.  Then the jail lacks that step too, and says so.
            with contextlib.suppress(OSError):
                stack.enter_context(capabilities_put_aside())
            memory.pagemap_fd = open_pagemap()


def open_pagemap() -> int:
    """Return a descriptor of the page map; HostError."""
    try:
        return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot see which pages of RAM are used: {error}") from error
