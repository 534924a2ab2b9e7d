"""Split virtqueues (virtio 1.2, 2.7 "Split Virtqueues"), the device's side.

Three areas in guest memory: the descriptor table and the available ring, written by the driver,
and the used ring, written here.  Nothing the guest can write is trusted twice: indices of the
device's own progress live in this object, a descriptor is copied before it is looked at, and
every walk is bounded by the queue size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from pyvmm.errors import GuestMemoryError, RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.queue import Buffer, Chain, FullFence, Queue
from pyvmm.virtio.spec import AVAIL_F_NO_INTERRUPT, DescriptorFlag

# struct virtq_desc { le64 addr; le32 len; le16 flags; le16 next; }
_DESCRIPTOR = struct.Struct("<QIHH")
_THREE_DESCRIPTORS = struct.Struct("<QIHHQIHHQIHH")
_DESCRIPTOR_SIZE = _DESCRIPTOR.size
_RING_HEADER_SIZE = 4  # le16 flags; le16 idx, in front of both rings
_EVENT_SIZE = 2  # le16 used_event or avail_event, behind both rings

# Plain integers: an IntFlag operation costs more than the rest of a chain walk.
_NEXT = int(DescriptorFlag.NEXT)
_WRITE = int(DescriptorFlag.WRITE)
_INDIRECT = int(DescriptorFlag.INDIRECT)
_NEXT_WRITE = _NEXT | _WRITE

_FLAGS, _IDX = 0, 1  # of a ring header seen as two 16-bit words


class SplitRing:
    """A split virtqueue in ``memory`` as ``queue``'s registers describe it.

    Raises RingError when the registers do not describe one.  ``indirect`` says whether
    VIRTIO_F_INDIRECT_DESC was negotiated.

    Notifications are not suppressed (used.flags stays 0), so whatever the driver adds after
    ``chains()`` looked is announced by another notification.
    """

    def __init__(self, queue: Queue, memory: GuestMemory, *, indirect: bool) -> None:
        size = queue.size
        if not 0 < size <= queue.max_size:
            raise RingError(f"queue size {size} is not within 1 to {queue.max_size}")
        if size & (size - 1):
            raise RingError(f"queue size {size} is not a power of 2")
        self._memory = memory
        self._size = size
        self._mask = size - 1
        self._indirect = indirect

        # 2.7 "Split Virtqueues" has the table of alignments and sizes.
        avail_bytes = _RING_HEADER_SIZE + 2 * size + _EVENT_SIZE
        used_bytes = _RING_HEADER_SIZE + 8 * size + _EVENT_SIZE
        self._table = _area(memory, "descriptor table", queue.descriptor_area, 16 * size, 16)
        avail = _area(memory, "available ring", queue.driver_area, avail_bytes, 2)
        used = _area(memory, "used ring", queue.device_area, used_bytes, 4)
        # Cast views read and write an element with one machine access; struct goes bytewise and
        # the driver could see half an index.
        self._avail_header = avail[:_RING_HEADER_SIZE].cast("H")
        self._avail_ring = avail[_RING_HEADER_SIZE:-_EVENT_SIZE].cast("H")
        self._used_header = used[:_RING_HEADER_SIZE].cast("H")
        # One 64-bit word is a struct virtq_used_elem { le32 id; le32 len; }.
        self._used_ring = used[_RING_HEADER_SIZE:-_EVENT_SIZE].cast("Q")

        self._next_avail = 0
        self._next_used = 0
        self._published = 0
        self._full_fence = FullFence()

    def chains(self) -> Iterator[Chain]:
        """The chains waiting now; see ``Ring.chains``."""
        heads = self._waiting_heads()
        for head in heads:
            # One at a time: chains that are not taken stay available.
            self._next_avail = (self._next_avail + 1) & 0xFFFF
            yield self._chain(head)

    def push(self, chain: Chain, written: int) -> None:
        """Put ``chain`` into the used ring with ``written`` bytes; see ``Ring.push``."""
        self._used_ring[self._next_used & self._mask] = chain.head | written << 32
        self._next_used = (self._next_used + 1) & 0xFFFF

    def publish(self) -> bool:
        """Store used.idx, then ask whether to interrupt; see ``Ring.publish``."""
        if self._next_used == self._published:
            return False
        # x86 keeps stores in order: the elements are visible before the index.
        self._used_header[_IDX] = self._published = self._next_used
        # The driver clears NO_INTERRUPT, then looks at used.idx; here it is the other way about.
        # Without the fence both could miss the other's store, and the interrupt would be lost.
        self._full_fence()
        return not self._avail_header[_FLAGS] & AVAIL_F_NO_INTERRUPT

    def pending(self) -> bool:
        """Whether avail.idx is ahead; see ``Ring.pending``."""
        return self._avail_header[_IDX] != self._next_avail

    def _waiting_heads(self) -> list[int]:
        """A copy of the available ring's new entries, checked; RingError if they cannot be."""
        available = self._avail_header[_IDX]
        count = (available - self._next_avail) & 0xFFFF
        if not count:
            return []
        if count > self._size:
            raise RingError(f"avail.idx is {count} ahead in a queue of {self._size}")
        start = self._next_avail & self._mask
        heads = self._avail_ring[start : start + count].tolist()
        if len(heads) < count:
            heads += self._avail_ring[: count - len(heads)].tolist()
        if max(heads) >= self._size:
            raise RingError(f"avail entry {max(heads)} in a queue of {self._size}")
        if len(set(heads)) < count:
            # All of them are outstanding at this moment, so the driver lost count.
            raise RingError("the same head is available twice")
        return heads

    def _chain(self, head: int) -> Chain:
        """The chain at ``head``: one structure if it has the usual shape, else a walk."""
        table, first = self._table, head
        if self._indirect:
            gpa, length, flags, _ = _DESCRIPTOR.unpack_from(table, head * _DESCRIPTOR_SIZE)
            if flags == _INDIRECT and length == _THREE_DESCRIPTORS.size:
                table, first = self._indirect_table(gpa, length), 0
        return self._three_in_a_row(head, table, first) or self._walk(head)

    def _three_in_a_row(self, head: int, table: memoryview, first: int) -> Chain | None:
        """The chain ``first``, ``first + 1``, ``first + 2`` of ``table``, as Linux lays out a
        block request of one segment; None if that is not what is there."""
        offset = first * _DESCRIPTOR_SIZE
        if self._size < 3 or offset + _THREE_DESCRIPTORS.size > len(table):
            return None
        gpa0, length0, flags0, next0, gpa1, length1, flags1, next1, gpa2, length2, flags2, _ = (
            _THREE_DESCRIPTORS.unpack_from(table, offset)
        )
        if (
            flags0 == _NEXT
            and next0 == first + 1
            and next1 == first + 2
            and flags2 == _WRITE
            and length0
            and length1
            and length2
        ):
            if flags1 == _NEXT_WRITE:
                return Chain(head, [(gpa0, length0)], [(gpa1, length1), (gpa2, length2)])
            if flags1 == _NEXT:
                return Chain(head, [(gpa0, length0), (gpa1, length1)], [(gpa2, length2)])
        return None

    def _walk(self, head: int) -> Chain:
        """The chain at ``head``, of any shape; RingError if its structure is wrong.

        "A driver MUST NOT create a descriptor chain longer than the Queue Size of the device"
        (2.7.5.3.1 "Driver Requirements: Indirect Descriptors"), which also ends every loop.
        """
        table, entries, index = self._table, self._size, head
        readable: list[Buffer] = []
        writable: list[Buffer] = []
        written_to = False
        budget = self._size
        while True:
            if index >= entries:
                raise RingError(f"descriptor {index} in a table of {entries}")
            if not budget:
                raise RingError(f"descriptor chain is longer than the queue size {self._size}")
            gpa, length, flags, following = _DESCRIPTOR.unpack_from(
                table, index * _DESCRIPTOR_SIZE
            )
            if flags & _INDIRECT:
                # WRITE is ignored here, as 2.7.5.3.2 "Device Requirements" demands.
                if table is not self._table:
                    raise RingError("indirect descriptor inside an indirect table")
                if flags & _NEXT:
                    raise RingError("descriptor with both INDIRECT and NEXT")
                table = self._indirect_table(gpa, length)
                entries, index = length // _DESCRIPTOR_SIZE, 0
                continue
            budget -= 1
            if flags & _WRITE:
                written_to = True
                if length:
                    writable.append((gpa, length))
            elif written_to:
                # 2.7.4.2 "Driver Requirements: Message Framing"
                raise RingError("device-readable descriptor after a device-writable one")
            elif length:
                readable.append((gpa, length))
            if not flags & _NEXT:
                return Chain(head, readable, writable)
            index = following

    def _indirect_table(self, gpa: int, length: int) -> memoryview:
        """The indirect table at ``gpa``; RingError unless it may be one."""
        if not self._indirect:
            raise RingError("indirect descriptor, but INDIRECT_DESC was not negotiated")
        if not length or length % _DESCRIPTOR_SIZE:
            raise RingError(f"indirect table of {length} bytes")
        try:
            return self._memory.view(gpa, length)
        except GuestMemoryError as error:
            raise RingError(f"indirect table: {error}") from error


def _area(
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
