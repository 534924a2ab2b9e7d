"""The memory around a request: header, status byte, ranges, indirect table.

There is one slot for each chain that can be in flight (virtio 1.2, 5.2.6 "Device Operation" of the
block device).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyvmm.driver.rings import Descriptor, align
from pyvmm.virtio.ring.chains import DESCRIPTOR_SIZE, NEXT, WRITE
from pyvmm.virtio.spec import BlockStatus

Segment = tuple[int, int]
"""``(address, length)`` of data, in bytes."""

MAX_TABLE_ENTRIES = 128
"""Descriptors for which a slot's indirect table has room; longer requests are chained directly."""

# A slot: struct virtio_blk_discard_write_zeroes { le64 sector; le32 num_sectors; le32 flags; };
# the header, struct virtio_blk_req { le32 type; le32 reserved; le64 sector; ... }; the indirect
# table; the status byte.  Native formats are faster than "<" ones, and the same bytes here.
_RANGE = struct.Struct("@QII")
_HEADER = struct.Struct("@IIQ")
_DESCRIPTOR = struct.Struct("@QII")  # le64 addr; le32 len; and 32 bits that depend on the ring
_HEADER_AND_THREE = struct.Struct("@IIQQIIQIIQII")
_RANGE_AT, _HEADER_AT, _TABLE_AT = 0, 16, 32
_NO_STATUS = 0xFF

_RET_OF_STATUS = {
    int(BlockStatus.OK): 0,
    int(BlockStatus.IOERR): -errno.EIO,
    int(BlockStatus.UNSUPP): -errno.ENOTSUP,
}


class Completion(NamedTuple):
    """A request's end: its ``context``, and ``ret``, which is 0 or a negative errno.

    It is -EIO if the request failed, -ENOTSUP if the device does not know it, or -EPROTO if the
    device left a status that does not exist.
    """

    context: Any
    ret: int


class RequestSlots:
    """Slots in ``memory``, which is zeroed and begins at ``address``.

    Each has a table of ``table_entries``, which is 0 if INDIRECT_DESC was not negotiated.
    ``packed`` is the format of the ring, and so of the tables.
    """

    def __init__(
        self, memory: memoryview, address: int, table_entries: int, *, packed: bool
    ) -> None:
        self.table_entries = table_entries
        self._memory = memory
        self._address = address
        self._stride = slot_bytes(table_entries)
        self._status_at = _TABLE_AT + DESCRIPTOR_SIZE * table_entries
        # The last word of a table's descriptors: of the header; of the first data segment, by its
        # WRITE flag; the step to the next segment's; of the status byte.
        if packed:  # le16 id; le16 flags, and only WRITE counts (2.8.7 "Indirect Flag")
            self._header_end, self._step, self._status_end = 0, 0, WRITE << 16
            self._data_end = {0: 0, WRITE: WRITE << 16}
        else:  # le16 flags; le16 next
            self._header_end, self._step, self._status_end = NEXT | 1 << 16, 1 << 16, WRITE
            self._data_end = {0: NEXT | 2 << 16, WRITE: NEXT | WRITE | 2 << 16}

    def put_range(self, slot: int, sector: int, sectors: int, flags: int) -> Segment:
        """Store the range of a discard or write-zeroes request; return its place."""
        at = slot * self._stride + _RANGE_AT
        _RANGE.pack_into(self._memory, at, sector, sectors, flags)
        return self._address + at, _RANGE.size

    def fill_table(
        self, slot: int, request_type: int, sector: int, segments: Sequence[Segment], flag: int
    ) -> Segment:
        """Store header and indirect table of a request for ``segments``; return the table's place.

        ``flag`` is WRITE if the device writes the segments.  The status byte is preset.
        """
        memory, at = self._memory, slot * self._stride
        address = self._address + at
        memory[at + self._status_at] = _NO_STATUS
        header, status = address + _HEADER_AT, address + self._status_at
        end = self._data_end[flag]
        if len(segments) == 1:  # most requests have one: pack everything in one go
            data, length = segments[0]
            _HEADER_AND_THREE.pack_into(
                memory, at + _HEADER_AT,
                request_type, 0, sector,
                header, _HEADER.size, self._header_end,
                data, length, end,
                status, 1, self._status_end,
            )
            return address + _TABLE_AT, 3 * DESCRIPTOR_SIZE
        _HEADER.pack_into(memory, at + _HEADER_AT, request_type, 0, sector)
        at += _TABLE_AT
        _DESCRIPTOR.pack_into(memory, at, header, _HEADER.size, self._header_end)
        for data, length in segments:
            at += DESCRIPTOR_SIZE
            _DESCRIPTOR.pack_into(memory, at, data, length, end)
            end += self._step
        _DESCRIPTOR.pack_into(memory, at + DESCRIPTOR_SIZE, status, 1, self._status_end)
        return address + _TABLE_AT, (len(segments) + 2) * DESCRIPTOR_SIZE

    def fill_chain(
        self, slot: int, request_type: int, sector: int, segments: Sequence[Segment], flag: int
    ) -> list[Descriptor]:
        """Do the same without a table; return the descriptors to put into the ring."""
        at = slot * self._stride
        address = self._address + at
        self._memory[at + self._status_at] = _NO_STATUS
        _HEADER.pack_into(self._memory, at + _HEADER_AT, request_type, 0, sector)
        chain = [(address + _HEADER_AT, _HEADER.size, 0)]
        chain += [(data, length, flag) for data, length in segments]
        chain.append((address + self._status_at, 1, WRITE))
        return chain

    def ret(self, slot: int) -> int:
        """Return ``Completion.ret`` of the request that was in ``slot``."""
        status = self._memory[slot * self._stride + self._status_at]
        return _RET_OF_STATUS.get(status, -errno.EPROTO)

    def release(self) -> None:
        """Drop the view of the memory."""
        self._memory.release()


def slot_bytes(table_entries: int) -> int:
    """Return the size of a slot in bytes."""
    return align(_TABLE_AT + DESCRIPTOR_SIZE * table_entries + 1)
