"""Descriptors: all are closed but those of a written list."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

from pyvmm.jail.calls import system_call

_CLOSE_RANGE = 436
_LAST = (1 << 31) - 1
"""No descriptor has a higher number (INT_MAX)."""


def close_others(kept: Iterable[int]) -> None:
    """Close every descriptor that is not in ``kept``; OSError if their numbers cannot be told.

    A process inherits descriptors that its parent forgot, and a module may keep one that nobody
    thinks of.  Each is a right that no later step takes away: /dev/kvm makes more machines, a
    directory opens files in it.  Objects that own a closed descriptor do not learn of it, and would
    close whatever has its number later.  So no object may own one of them.
    """
    for first, last in _gaps(kept):
        try:
            system_call(_CLOSE_RANGE, first, last, 0)
        except OSError as error:  # before Linux 5.9, or forbidden by a sandbox around us
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            _close_one_by_one(set(kept))
            return


def _gaps(kept: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last number of each range between those in ``kept``."""
    first = 0
    for fd in sorted(set(kept)):
        if first < fd:
            yield first, fd - 1
        first = fd + 1
    yield first, _LAST


def _close_one_by_one(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in kept:
            try:
                os.close(fd)
            except OSError as error:
                if error.errno != errno.EBADF:  # the listing's own descriptor is closed already
                    raise
