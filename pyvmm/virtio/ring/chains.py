"""What split and packed rings share in turning descriptors into chains."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pyvmm.errors import GuestMemoryError, RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.ring.queue import (
    DESCRIPTOR_WORK,
    PLAIN_HEADER_BYTES,
    PLAIN_STATUS_BYTES,
    Buffer,
    Chain,
    PlainChain,
    Queue,
)
from pyvmm.virtio.spec import MAX_QUEUE_SIZE, DescriptorFlag

DESCRIPTOR_SIZE = 16
"""Bytes of a descriptor, split or packed: both are le64, le32, le16, le16.

Native formats are twice as fast as "<" ones, and the same bytes on the hosts there are.
"""
DESCRIPTOR = struct.Struct("@QIHH")

PLAIN_MAX_BYTES = 64 << 20
"""A chain of more data than this is not called plain."""
PLAIN_FRAME_BYTES = PLAIN_HEADER_BYTES + PLAIN_STATUS_BYTES
PLAIN_WORK = PLAIN_FRAME_BYTES + 3 * DESCRIPTOR_WORK
"""``plain_work`` of a chain with one data buffer, but for its length."""
PLAIN_SIZE = 3 * DESCRIPTOR_SIZE
"""Bytes of the shortest plain chain: header, data, status."""
_BARE_SIZE = 2 * DESCRIPTOR_SIZE
"""Bytes of a chain without data: header, status."""

# Plain integers: an IntFlag operation costs more than the rest of a chain walk.
NEXT = int(DescriptorFlag.NEXT)
WRITE = int(DescriptorFlag.WRITE)
INDIRECT = int(DescriptorFlag.INDIRECT)
FLAGS_MASK = 0xFFFF


def check_size(queue: Queue) -> int:
    """The queue's size in entries; RingError unless the device allows it."""
    if not 0 < queue.size <= min(queue.max_size, MAX_QUEUE_SIZE):
        raise RingError(f"queue size {queue.size} is not within 1 to {queue.max_size}")
    return queue.size


def ring_area(
    memory: GuestMemory, name: str, gpa: int | None, length: int, alignment: int
) -> memoryview:
    """A view of one part of the virtqueue; RingError unless set, aligned and all in RAM."""
    if gpa is None:
        raise RingError(f"the {name} has no address")
    if gpa % alignment:
        raise RingError(f"the {name} at {gpa:#x} is not aligned to {alignment} bytes")
    try:
        return memory.view(gpa, length)
    except GuestMemoryError as error:
        raise RingError(f"the {name}: {error}") from error


def make_chain(
    head: int, descriptors: Iterable[tuple[int, int, int]], slots: int = 1
) -> Chain:
    """Return the chain of ``(gpa, length, flags)`` descriptors, without the empty ones.

    RingError if a readable one comes after a writable one.
    """
    readable: list[Buffer] = []
    writable: list[Buffer] = []
    written_to = False
    empty = 0
    for gpa, length, flags in descriptors:
        if flags & WRITE:
            written_to = True
            if length:
                writable.append((gpa, length))
            else:
                empty += 1
        elif written_to:
            # 2.7.4.2 "Driver Requirements: Message Framing"
            raise RingError("device-readable descriptor after a device-writable one")
        elif length:
            readable.append((gpa, length))
        else:
            empty += 1
    return Chain(head, readable, writable, slots, empty)


class IndirectTables:
    """Finds indirect descriptor tables; ``allowed`` is whether INDIRECT_DESC was negotiated.

    A table may be longer than the ring: a chain may have ``longest`` descriptors in all, as many
    as the largest ring that the device allows.  Linux makes tables of SEG_MAX + 2 descriptors
    whatever the ring's size, and reads SEG_MAX before the ring has one.

    ``near`` is the region of RAM around the virtqueue, where its tables usually are too, and
    ``near_gpa`` where it begins: what lies in it can be checked and read in a third of the time
    that ``at`` takes.

    ``layout`` takes a descriptor apart into ``(gpa, length, link)``, where ``link`` is its flags,
    in the low 16 bits, and whatever else leads to the next one.  ``reading`` and ``writing`` are
    the links, in order, of a chain of ``longest`` whose data is to be read and to be written.
    """

    __slots__ = (
        "_allowed", "_last_short", "_layout", "_memory", "_reading", "_unpack_three",
        "_unpack_two", "_writing", "longest", "near", "near_gpa",
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
        self._memory = memory
        self._allowed = allowed
        self._layout = layout
        self._reading = reading
        self._writing = writing
        self.longest = len(reading)
        self.near_gpa = 0
        self.near = memoryview(b"")
        for region in memory.regions:
            if queue_gpa is not None and region.gpa <= queue_gpa < region.end:
                self.near_gpa = region.gpa
                self.near = memory.view(region.gpa, region.length)
        several = layout.format.removeprefix("@")
        self._unpack_two = struct.Struct(f"@{several * 2}").unpack_from
        self._unpack_three = struct.Struct(f"@{several * 3}").unpack_from
        enough = self.longest * DESCRIPTOR_SIZE >= PLAIN_SIZE
        self._last_short = len(self.near) - PLAIN_SIZE if allowed and enough else -1

    @property
    def last_short(self) -> int:
        """Where in ``near`` the table of a plain chain of one data buffer may begin at last; less
        than 0 if nowhere."""
        return self._last_short

    def short(self, token: int, gpa: int, length: int) -> PlainChain | None:
        """``plain`` for the two tables that a driver with one request at a time has, nearly
        always: with one data buffer, and with none."""
        near, offset = self.near, gpa - self.near_gpa
        if not 0 <= offset <= self._last_short:
            return None
        if length == PLAIN_SIZE:
            (
                header, header_length, header_link, data, data_length, data_link,
                status, status_length, status_link,
            ) = self._unpack_three(near, offset)
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
            ) = self._unpack_two(near, offset)
            data = data_length = writes = 0
        else:
            return None
        if (
            header_length != PLAIN_HEADER_BYTES
            or header_link != self._reading[0]
            or status_length != PLAIN_STATUS_BYTES
            or status_link & FLAGS_MASK != WRITE
        ):
            return None
        return token, header, data, data_length, writes, status, ()

    def plain(self, token: int, gpa: int, length: int) -> PlainChain | None:
        """The plain chain that the table of ``length`` bytes at ``gpa`` is, if it is one."""
        offset = gpa - self.near_gpa
        if (
            not PLAIN_SIZE <= length <= self.longest * DESCRIPTOR_SIZE
            or length % DESCRIPTOR_SIZE
            or not 0 <= offset <= len(self.near) - length
            or not self._allowed
        ):
            return None
        table = self._layout.iter_unpack(self.near[offset : offset + length])
        gpas, lengths, links = zip(*table, strict=True)
        last = len(links) - 1
        if (
            lengths[0] != PLAIN_HEADER_BYTES
            or lengths[last] != PLAIN_STATUS_BYTES
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

    def at(self, gpa: int, length: int) -> memoryview:
        """The table of ``length`` bytes at ``gpa``; RingError unless it may be one."""
        if not self._allowed:
            raise RingError("indirect descriptor, but INDIRECT_DESC was not negotiated")
        if not length or length % DESCRIPTOR_SIZE:
            raise RingError(f"indirect table of {length} bytes")
        try:
            return self._memory.view(gpa, length)
        except GuestMemoryError as error:
            raise RingError(f"indirect table: {error}") from error

    def too_long(self) -> RingError:
        """Return the error of a chain with a table and more than ``longest`` descriptors."""
        return RingError(
            f"descriptor chain is longer than {self.longest}, the most entries of a queue"
        )
