"""The ranges of a discard or write-zeroes request (5.2.6 "Device Operation")."""

from __future__ import annotations

import struct

from pyvmm.memory import GuestMemory
from pyvmm.startup.types import Record
from pyvmm.virtio.block.request import BadRequestError, UnsupportedRequestError
from pyvmm.virtio.ring.queue import Buffer
from pyvmm.virtio.spec import WRITE_ZEROES_F_UNMAP

# struct virtio_blk_discard_write_zeroes { le64 sector; le32 num_sectors;
# struct { le32 unmap:1; le32 reserved:31; } flags; };
_SEGMENT = struct.Struct("<QII")
SEGMENT_SIZE = _SEGMENT.size
_KNOWN_FLAGS = WRITE_ZEROES_F_UNMAP


class Segment(Record, kw_only=False):
    """``sector`` and ``sectors`` are in units of 512 bytes; ``unmap`` allows to free the room."""

    sector: int
    sectors: int
    unmap: bool


def parse_segments(
    buffers: list[Buffer],
    memory: GuestMemory,
    *,
    may_unmap: bool,
    max_segments: int,
    max_sectors: int,
    capacity_sectors: int,
) -> list[Segment]:
    """Return the ranges in ``buffers``, all judged before anything is done to the disk.

    UnsupportedRequestError for a flag that is unknown, or for ``unmap`` where it may not be (in
    a discard).  BadRequestError unless there are 1 to ``max_segments``, each of 1 to
    ``max_sectors`` sectors within ``capacity_sectors``, and all together no more than that.
    """
    length = sum(buffer_length for _, buffer_length in buffers)
    if not length or length % _SEGMENT.size or length > max_segments * _SEGMENT.size:
        raise BadRequestError(f"segments of {length} bytes in all")
    raw = b"".join(memory.read(gpa, buffer_length) for gpa, buffer_length in buffers)
    segments = []
    allowed = _KNOWN_FLAGS if may_unmap else 0
    for sector, sectors, flags in _SEGMENT.iter_unpack(raw):
        # 5.2.6.2 "Device Requirements: Device Operation": "The device MUST set the status byte
        # to VIRTIO_BLK_S_UNSUPP for discard, secure erase and write zeroes commands if any
        # unknown flag is set", and for discards "if the unmap flag is set".
        if flags & ~allowed:
            raise UnsupportedRequestError(f"segment flags {flags:#x}")
        segments.append(Segment(sector, sectors, bool(flags & WRITE_ZEROES_F_UNMAP)))
    for segment in segments:
        if not 0 < segment.sectors <= max_sectors:
            raise BadRequestError(f"a segment of {segment.sectors} sectors")
        if segment.sector + segment.sectors > capacity_sectors:
            raise BadRequestError(f"{segment.sectors} sectors at {segment.sector} leave the disk")
    if sum(segment.sectors for segment in segments) > capacity_sectors:
        raise BadRequestError("segments overlap: they are more than the disk has")
    return segments
