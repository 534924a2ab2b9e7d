"""Standard input, output and error, whatever the caller left of them."""

from __future__ import annotations

import os
import sys


def open_standard_descriptors() -> None:
    """Put /dev/null where a standard descriptor is closed.

    Otherwise the next file opened, a disk image say, would take its number, and what is meant for
    standard output would go there.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # What Python found closed when it started, it has set to None.
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def allow_many_descriptors() -> None:
    """Raise the soft limit of open files to the hard one.

    It is low, 1024 mostly, for the sake of select(2) alone, which nothing here uses.
    """
    import contextlib  # pyvmm run starts without these two
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
