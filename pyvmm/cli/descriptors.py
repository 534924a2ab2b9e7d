"""Standard input, output and error, whatever the caller left of them; and open files."""

from __future__ import annotations

import os
import sys

from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.config import DiskConfig, RunConfig

MANY_FILES = 64
"""Enough open files for a command that does not count its own."""


def open_standard_descriptors() -> None:
    """Open /dev/null for each standard descriptor that is closed.

    Otherwise the next file opened, a disk image say, would take the number, and text for standard
    output would go into that file.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has set to None each stream whose descriptor was closed at its start.
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def allow_many_descriptors() -> None:
    """Raise the soft limit of open files to the hard one.

    The soft limit is low, mostly 1024, only because of select(2), which nothing here uses.
    """
    import contextlib  # pyvmm run starts without both
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def needed_descriptors(config: RunConfig) -> int:
    """Return how many open files a run of ``config`` needs, a few to spare included."""
    from pyvmm.config import DiskConfig

    needed = 28 + 2 * (config.cpus - 1)
    if config.agent != "none":
        needed += 9  # looking again, interrupting, waiting; one doorbell per queue
    for disk in config.disks:
        # The disk itself; looking again, interrupting, waiting; one doorbell per queue.
        needed += 4 + disk.queues
        if not isinstance(disk, DiskConfig):
            needed += 2  # waiting for its back end, and RAM that both can map
        elif disk.source.snapshot:
            needed += 1
    return needed


def needed_for_export(disk: DiskConfig) -> int:
    """Return how many open files an export of ``disk`` needs while a front end uses it."""
    # Itself, the disk, a connection each way, 8 regions of memory, 8 that are on their way.
    return 40 + 3 * disk.queues + disk.source.snapshot
