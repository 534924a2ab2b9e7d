"""The limits of a block device on a request, checked before anything is queued.

virtio 1.2, 5.2.4 "Device configuration layout", 5.2.6.1 "Driver Requirements".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pyvmm.driver.errors import RequestError
from pyvmm.driver.request import Segment
from pyvmm.driver.transport import Transport
from pyvmm.startup.types import name_of
from pyvmm.virtio.block.config import config_space_length
from pyvmm.virtio.spec import SECTOR_SIZE, BlockFeature

# struct virtio_blk_config as far as a driver needs it: le64 capacity; le32 size_max; le32
# seg_max; [geometry, blk_size, topology, writeback, unused0]; le16 num_queues; le32
# max_discard_sectors; [le32 max_discard_seg; le32 discard_sector_alignment;] le32
# max_write_zeroes_sectors.
_CONFIG = struct.Struct("<QII18xHI8xI")
_MAX_LENGTH = 0xFFFF_FFFF  # of a descriptor, and of a range in sectors: le32


class BlockLimits:
    """The limits of the disk behind ``transport``, whose features are negotiated.

    ``capacity_bytes`` is its size, ``max_queues`` the most queues.  A request has at most
    ``max_segments`` pieces of memory, each of at most ``max_segment_bytes``.  A discard covers at
    most ``max_discard_bytes``, a write-zeroes request ``max_write_zeroes_bytes``.  ``queue_size``
    bounds a chain: header, segments and status are no more descriptors.
    """

    def __init__(self, transport: Transport, queue_size: int) -> None:
        self._transport = transport
        features = self._features = transport.acked_features
        self.read_only = bool(transport.features & BlockFeature.RO)
        capacity, size_max, seg_max, num_queues, discard_sectors, zero_sectors = self._read()
        self.capacity_bytes = capacity * SECTOR_SIZE
        self.max_queues = num_queues if features & BlockFeature.MQ else 1
        self.max_segments = queue_size - 2
        if features & BlockFeature.SEG_MAX:
            # A device that says 0 means the one segment that every request needs.  Linux reads it
            # so too.
            self.max_segments = min(self.max_segments, max(1, seg_max))
        # 0 is no limit, for Linux too: qemu-storage-daemon offers SIZE_MAX and says 0.
        size_max = size_max if features & BlockFeature.SIZE_MAX else 0
        self.max_segment_bytes = size_max or _MAX_LENGTH
        self.max_discard_bytes = (discard_sectors or _MAX_LENGTH) * SECTOR_SIZE
        self.max_write_zeroes_bytes = (zero_sectors or _MAX_LENGTH) * SECTOR_SIZE

    def refresh_capacity(self) -> bool:
        """Ask the device again how large the disk is; return True if that has changed."""
        before = self.capacity_bytes
        self.capacity_bytes = self._read()[0] * SECTOR_SIZE
        return self.capacity_bytes != before

    def _read(self) -> tuple[int, int, int, int, int, int]:
        # Read no more than needed: a back end may refuse to show bytes that it does not have.
        length = min(_CONFIG.size, config_space_length(self._transport.features))
        return _CONFIG.unpack(self._transport.get_config(0, length).ljust(_CONFIG.size, b"\0"))

    def sector(self, offset: int, length: int) -> int:
        """Return the sector at ``offset``.

        RequestError unless ``length`` bytes from there are whole sectors of the disk, at least one.
        """
        if (offset | length) % SECTOR_SIZE:
            raise RequestError(f"{length} bytes at {offset} are not whole sectors of 512 bytes")
        if length <= 0 or offset < 0 or offset + length > self.capacity_bytes:
            raise RequestError(
                f"{length} bytes at {offset} are not on the disk, which has {self.capacity_bytes}"
            )
        return offset // SECTOR_SIZE

    def check_writable(self) -> None:
        """Raise RequestError if the disk is read-only."""
        if self.read_only:
            raise RequestError("the disk is read-only")

    def check_feature(self, feature: BlockFeature) -> None:
        """Raise RequestError unless ``feature`` was negotiated."""
        if not self._features & feature:
            raise RequestError(f"VIRTIO_BLK_F_{name_of(BlockFeature, feature)} was not negotiated")

    def check_range(self, name: str, length: int, limit: int) -> None:
        """Raise RequestError if a request called ``name`` covers more than ``limit`` bytes."""
        if length > limit:
            raise RequestError(f"a {name} of {length} bytes; the limit is {limit}")

    def check_mapped(self, segments: Iterable[Segment]) -> None:
        """Raise RequestError if one of ``segments`` is memory that the device cannot reach."""
        for address, length in segments:
            if not self._transport.is_mapped(address, length):
                raise RequestError(f"memory {address:#x}+{length:#x} is in no mapped region")

    def cut(self, buffers: Iterable[Segment]) -> list[Segment]:
        """Return ``buffers`` as segments that are not too long; empty ones are left out.

        RequestError if they become too many.
        """
        most = self.max_segment_bytes
        segments: list[Segment] = []
        for address, length in buffers:
            while length > most and len(segments) <= self.max_segments:
                segments.append((address, most))
                address, length = address + most, length - most
            if length:
                segments.append((address, length))
        if len(segments) > self.max_segments:
            raise RequestError(
                f"a request of more than {self.max_segments} segments of {most} bytes"
            )
        return segments
