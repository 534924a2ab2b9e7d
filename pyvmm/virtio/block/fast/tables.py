"""Plain chains in indirect tables: recognised from a table's numbers, without a walk."""

from __future__ import annotations

import struct

from pyvmm.memory import GuestMemory
from pyvmm.virtio.block.fast.plain import PLAIN_FRAME_BYTES, PLAIN_MAX_BYTES, PlainChain
from pyvmm.virtio.block.request import HEADER_SIZE, STATUS_SIZE
from pyvmm.virtio.ring.chains import DESCRIPTOR_SIZE, WRITE

PLAIN_SIZE = 3 * DESCRIPTOR_SIZE
"""Bytes of the shortest plain chain: header, data, status."""
_BARE_SIZE = 2 * DESCRIPTOR_SIZE
"""Bytes of a chain without data: header, status."""
FLAGS_MASK = 0xFFFF


class PlainTables:
    """Reads indirect tables that may hold a plain chain; ``allowed`` if INDIRECT_DESC was
    negotiated.

    Only tables in ``region`` are read, the region of RAM around the virtqueue, because a check
    there is cheap.  ``region_gpa`` is where the region begins.

    ``layout`` takes a descriptor apart into ``(gpa, length, link)``.  A ``link`` has the flags in
    its low 16 bits, and above them the way to the next descriptor, if the ring has one.
    ``reading`` and ``writing`` are the links, in order, of the longest chain there may be: one
    whose data is read, and one whose data is written.
    """

    __slots__ = (
        "_allowed", "_last_short", "_layout", "_longest", "_reading", "_unpack_three",
        "_unpack_two", "_writing", "region", "region_gpa",
    )

    def __init__(
        self,
        memory: GuestMemory,
        queue_gpa: int | None,
        *,
        allowed: bool,
        layout: struct.Struct,
        reading: tuple[int, ...],
        writing: tuple[int, ...],
    ) -> None:
        self._allowed = allowed
        self._layout = layout
        self._reading = reading
        self._writing = writing
        self._longest = len(reading)
        self.region_gpa = 0
        self.region = memoryview(b"")
        for one in memory.regions:
            if queue_gpa is not None and one.gpa <= queue_gpa < one.end:
                self.region_gpa = one.gpa
                self.region = memory.view(one.gpa, one.length)
        several = layout.format.removeprefix("@")
        self._unpack_two = struct.Struct(f"@{several * 2}").unpack_from
        self._unpack_three = struct.Struct(f"@{several * 3}").unpack_from
        enough = self._longest * DESCRIPTOR_SIZE >= PLAIN_SIZE
        self._last_short = len(self.region) - PLAIN_SIZE if allowed and enough else -1

    @property
    def last_short(self) -> int:
        """The last offset in ``region`` at which the table of a plain chain of one data buffer may
        begin; less than 0 if there is none."""
        return self._last_short

    def short(self, token: int, gpa: int, length: int) -> PlainChain | None:
        """Return the plain chain in a table with one data buffer or none; None for any other.

        A driver with one request at a time has nearly always one of these two."""
        ram, offset = self.region, gpa - self.region_gpa
        if not 0 <= offset <= self._last_short:
            return None
        if length == PLAIN_SIZE:
            (
                header, header_length, header_link, data, data_length, data_link,
                status, status_length, status_link,
            ) = self._unpack_three(ram, offset)
            if not 0 < data_length <= PLAIN_MAX_BYTES:
                return None
            if data_link == self._writing[1]:
                writes = WRITE
            elif data_link == self._reading[1]:
                writes = 0
            else:
                return None
        elif length == _BARE_SIZE:
            (
                header, header_length, header_link, status, status_length, status_link,
            ) = self._unpack_two(ram, offset)
            data = data_length = writes = 0
        else:
            return None
        if (
            header_length != HEADER_SIZE
            or header_link != self._reading[0]
            or status_length != STATUS_SIZE
            or status_link & FLAGS_MASK != WRITE
        ):
            return None
        return token, header, data, data_length, writes, status, ()

    def plain(self, token: int, gpa: int, length: int) -> PlainChain | None:
        """Return the plain chain in the table of ``length`` bytes at ``gpa``, else None."""
        offset = gpa - self.region_gpa
        if (
            not PLAIN_SIZE <= length <= self._longest * DESCRIPTOR_SIZE
            or length % DESCRIPTOR_SIZE
            or not 0 <= offset <= len(self.region) - length
            or not self._allowed
        ):
            return None
        table = self._layout.iter_unpack(self.region[offset : offset + length])
        gpas, lengths, links = zip(*table, strict=True)
        last = len(links) - 1
        if (
            lengths[0] != HEADER_SIZE
            or lengths[last] != STATUS_SIZE
            or links[last] & FLAGS_MASK != WRITE
            or 0 in lengths
        ):
            return None
        if links[:last] == self._writing[:last]:
            writes = WRITE
        elif links[:last] == self._reading[:last]:
            writes = 0
        else:
            return None
        data_bytes = sum(lengths) - PLAIN_FRAME_BYTES
        if data_bytes > PLAIN_MAX_BYTES:
            return None
        pieces = list(zip(gpas[1:last], lengths[1:last], strict=True))
        return token, gpas[0], gpas[1], data_bytes, writes, gpas[last], pieces

