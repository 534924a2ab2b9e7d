"""Runs: parts of RAM as ``(offset, length)`` in bytes, ascending, disjoint and not empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pyvmm.memory import PAGE_SIZE, GuestMemory, Region

Run = tuple[int, int]
MOST_RUNS = 4096
"""Runs of one layer, because each is a mapping and a process has 65,530 of those."""
USUAL_RUNS = 1024
"""Runs of a diff that is written: several clones of it need to fit into one process."""


def total(runs: Iterable[Run]) -> int:
    """Return the bytes in ``runs``."""
    return sum(length for _, length in runs)


def joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Yield ``runs``, ascending but maybe touching or overlapping, as few as possible."""
    start = end = -1
    for offset, length in runs:
        if offset > end:
            if end > start:
                yield start, end - start
            start, end = offset, offset + length
        else:
            end = max(end, offset + length)
    if end > start:
        yield start, end - start


def union(first: Sequence[Run], second: Sequence[Run]) -> list[Run]:
    """Return the runs of both."""
    if not first or not second:
        return list(first or second)
    return list(joined(sorted((*first, *second))))


def common(first: Sequence[Run], second: Sequence[Run]) -> Iterator[Run]:
    """Yield the parts that are in both."""
    others = iter(second)
    offset, length = next(others, (0, 0))
    for start, size in first:
        end = start + size
        while length:
            low, high = max(start, offset), min(end, offset + length)
            if low < high:
                yield low, high - low
            if offset + length > end:
                break
            offset, length = next(others, (0, 0))


def coarser(runs: Sequence[Run], size_bytes: int, most: int = MOST_RUNS) -> list[Run]:
    """Return at most ``most`` runs that contain ``runs`` and lie in ``size_bytes``.

    Their bounds are multiples of a granule, which is a page, and doubles until they are few enough.
    """
    found, granule = list(runs), PAGE_SIZE
    while len(found) > most:
        granule *= 2
        found = list(joined(_widened(found, granule, size_bytes)))
    return found


def _widened(runs: Iterable[Run], granule: int, size_bytes: int) -> Iterator[Run]:
    for offset, length in runs:
        start = offset - offset % granule
        yield start, min(-(-(offset + length) // granule) * granule, size_bytes) - start


def parts_in_regions(
    memory: GuestMemory, runs: Iterable[Run]
) -> Iterator[tuple[Region, int, int]]:
    """Yield for each part of ``runs`` its region, and its start and length there."""
    for offset, length in runs:
        end = offset + length
        for region in memory.regions:
            start = max(offset, region.position)
            stop = min(end, region.position + region.length)
            if start < stop:
                yield region, start - region.position, stop - start
