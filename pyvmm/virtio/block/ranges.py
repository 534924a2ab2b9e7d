"""Discard and write-zeroes requests: what their ranges do to the disk, and the work it is."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.memory import GuestMemory
from pyvmm.storage.backend import BlockBackend
from pyvmm.virtio.block.config import (
    MAX_DISCARD_SECTORS,
    MAX_SEGMENTS,
    MAX_WRITE_ZEROES_SECTORS,
)
from pyvmm.virtio.block.request import BadRequestError, Request
from pyvmm.virtio.block.segments import SEGMENT_SIZE, Segment, parse_segments
from pyvmm.virtio.device import CALL_WORK
from pyvmm.virtio.spec import SECTOR_SIZE

_DISCARDED_PER_MOVED = 16
"""Bytes that are discarded, out of the page cache too, while one is moved."""
_RANGE_WORK = 16 << 10
"""The work of judging a range, served or not."""


def discard(
    request: Request, memory: GuestMemory, backend: BlockBackend, add_work: Callable[[int], None]
) -> None:
    """Discard the ranges of ``request``; ``add_work`` gets the work of each.

    BadRequestError, UnsupportedRequestError; OSError from the backend.
    """
    for one in _judged(
        request, memory, backend, add_work, may_unmap=False, max_sectors=MAX_DISCARD_SECTORS
    ):
        backend.discard(one.sector * SECTOR_SIZE, one.sectors * SECTOR_SIZE)
        add_work(CALL_WORK + one.sectors * SECTOR_SIZE // _DISCARDED_PER_MOVED)


def write_zeroes(
    request: Request, memory: GuestMemory, backend: BlockBackend, add_work: Callable[[int], None]
) -> None:
    """Zero the ranges of ``request``, otherwise as ``discard``; they may still need a flush."""
    for one in _judged(
        request, memory, backend, add_work, may_unmap=True, max_sectors=MAX_WRITE_ZEROES_SECTORS
    ):
        backend.write_zeroes(
            one.sector * SECTOR_SIZE, one.sectors * SECTOR_SIZE, unmap=one.unmap
        )
        add_work(CALL_WORK + one.sectors * SECTOR_SIZE)


def _judged(
    request: Request,
    memory: GuestMemory,
    backend: BlockBackend,
    add_work: Callable[[int], None],
    *,
    may_unmap: bool,
    max_sectors: int,
) -> list[Segment]:
    """Return the ranges of ``request``, which is not offered for a read-only disk."""
    if request.writable:
        raise BadRequestError("discard or write-zeroes request with device-writable data")
    length = sum(buffer_length for _, buffer_length in request.readable)
    add_work(min(length // SEGMENT_SIZE, MAX_SEGMENTS) * _RANGE_WORK)
    return parse_segments(
        request.readable,
        memory,
        may_unmap=may_unmap,
        max_segments=MAX_SEGMENTS,
        max_sectors=max_sectors,
        capacity_sectors=backend.size_bytes // SECTOR_SIZE,
    )
