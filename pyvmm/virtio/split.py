"""Split virtqueues (virtio 1.2, 2.7 "Split Virtqueues"), the device's side.

Three areas in guest memory: the descriptor table and the available ring, written by the driver,
and the used ring, written here.  Nothing the guest can write is trusted twice: indices of the
device's own progress live in this object, a descriptor is copied before it is looked at, and
every walk is bounded by the queue size.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.errors import RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.chains import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    INDIRECT,
    NEXT,
    THREE_DESCRIPTORS,
    WRITE,
    IndirectTables,
    check_size,
    collect,
    ring_area,
)
from pyvmm.virtio.queue import Chain, FullFence, Queue
from pyvmm.virtio.spec import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY

_RING_HEADER_SIZE = 4  # le16 flags; le16 idx, in front of both rings
_EVENT_SIZE = 2  # le16 used_event or avail_event, behind both rings
_FLAGS, _IDX = 0, 1  # of a ring header seen as two 16-bit words
_NEXT_WRITE = NEXT | WRITE

_unpack = DESCRIPTOR.unpack_from
_unpack_three = THREE_DESCRIPTORS.unpack_from
_THREE_SIZE = THREE_DESCRIPTORS.size


class SplitRing:
    """A split virtqueue in ``memory`` as ``queue``'s registers describe it; see ``queue.Ring``.

    Raises RingError when the registers do not describe one.  ``indirect`` and ``event_idx`` say
    whether VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX were negotiated.
    """

    def __init__(
        self, queue: Queue, memory: GuestMemory, *, indirect: bool, event_idx: bool
    ) -> None:
        self._size = size = check_size(queue)
        if size & (size - 1):
            raise RingError(f"queue size {size} is not a power of 2")
        self._mask = size - 1
        self._event_idx = event_idx

        # 2.7 "Split Virtqueues" has the table of alignments and sizes.
        avail_bytes = _RING_HEADER_SIZE + 2 * size + _EVENT_SIZE
        used_bytes = _RING_HEADER_SIZE + 8 * size + _EVENT_SIZE
        table_bytes = DESCRIPTOR_SIZE * size
        self._table = ring_area(memory, "descriptor table", queue.descriptor_area, table_bytes, 16)
        avail = ring_area(memory, "available ring", queue.driver_area, avail_bytes, 2)
        used = ring_area(memory, "used ring", queue.device_area, used_bytes, 4)
        # Cast views read and write an element with one machine access; struct goes bytewise and
        # the driver could see half an index.
        self._avail_header = avail[:_RING_HEADER_SIZE].cast("H")
        self._avail_ring = avail[_RING_HEADER_SIZE:-_EVENT_SIZE].cast("H")
        self._used_event = avail[-_EVENT_SIZE:].cast("H")
        self._used_header = used[:_RING_HEADER_SIZE].cast("H")
        # One 64-bit word is a struct virtq_used_elem { le32 id; le32 len; }.
        self._used_ring = used[_RING_HEADER_SIZE:-_EVENT_SIZE].cast("Q")
        self._avail_event = used[-_EVENT_SIZE:].cast("H")

        self._indirect = IndirectTables(memory, queue.descriptor_area, allowed=indirect)
        # Where a usual request may be read at once: see _usual.
        self._last_direct = table_bytes - _THREE_SIZE
        self._near, self._near_gpa = self._indirect.near, self._indirect.near_gpa
        may_be_indirect = indirect and size >= 3
        self._last_near = len(self._near) - _THREE_SIZE if may_be_indirect else -1

        self._next_avail = self._next_used = self._published = 0
        if queue.base is not None:
            self._resume(queue.base)
        self._full_fence = FullFence()

    def _resume(self, base: int) -> None:
        """Go on at ``base``; how far used chains are is in the used ring."""
        used = self._used_header[_IDX]
        if not base <= 0xFFFF or (base - used) & 0xFFFF > self._size:
            raise RingError(
                f"ring base {base} is not within {self._size} of the used index {used}"
            )
        self._next_avail = base
        self._next_used = self._published = used

    @property
    def base(self) -> int:
        """The available index; see ``Ring.base``."""
        return self._next_avail

    def untake(self, chain: Chain) -> None:
        """One entry of the available ring back; see ``Ring.untake``."""
        self._next_avail = (self._next_avail - 1) & 0xFFFF

    def chains(self) -> Iterator[Chain]:
        """The chains that are available now; see ``Ring.chains``."""
        if not self._event_idx:
            self._used_header[_FLAGS] = USED_F_NO_NOTIFY
        # With EVENT_IDX flags are 0; avail_event stays behind, which keeps the driver quiet too.
        for head in self._waiting_heads():
            # One at a time: chains that are not taken stay available.
            self._next_avail = (self._next_avail + 1) & 0xFFFF
            yield self._usual(head) or self._walk(head)

    def push(self, chain: Chain, written: int) -> None:
        """Put ``chain`` into the used ring with ``written`` bytes; see ``Ring.push``."""
        used = self._next_used
        self._used_ring[used & self._mask] = chain.head | written << 32
        self._next_used = (used + 1) & 0xFFFF

    def publish(self) -> bool:
        """Store used.idx, then ask whether to interrupt; see ``Ring.publish``."""
        new, old = self._next_used, self._published
        if new == old:
            return False
        # x86 keeps stores in order: the elements are visible before the index.
        self._used_header[_IDX] = self._published = new
        # The driver asks for interrupts, then looks at used.idx; here it is the other way about.
        # Without the fence both could miss the other's store, and the interrupt would be lost.
        self._full_fence()
        if self._event_idx:
            # 2.7.7.2 "Device Requirements: Used Buffer Notification Suppression": if an element
            # was put where used_event points, "the device MUST send a notification".
            return (self._used_event[0] - old) & 0xFFFF < (new - old) & 0xFFFF
        return not self._avail_header[_FLAGS] & AVAIL_F_NO_INTERRUPT

    def pending(self) -> bool:
        """Ask for a notification, then compare avail.idx; see ``Ring.pending``."""
        if self._event_idx:
            self._avail_event[0] = self._next_avail
        else:
            self._used_header[_FLAGS] = 0
        # The driver stores avail.idx, then reads what was stored above.
        self._full_fence()
        return self._avail_header[_IDX] != self._next_avail

    def _waiting_heads(self) -> list[int]:
        """A copy of the available ring's new entries, checked; RingError if they cannot be."""
        available = self._avail_header[_IDX]
        count = (available - self._next_avail) & 0xFFFF
        if not count:
            return []
        # Ahead of what was given back: a chain that was taken and is held back still counts.
        ahead = (available - self._published) & 0xFFFF
        if ahead > self._size:
            raise RingError(f"avail.idx is {ahead} ahead in a queue of {self._size}")
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

    def _usual(self, head: int) -> Chain | None:
        """The chain at ``head`` if it is a block request of one segment as every driver lays it
        out, direct or indirect: three full descriptors in a row.  None if it is not."""
        offset, first = head * DESCRIPTOR_SIZE, head
        table, last_offset = self._table, self._last_direct
        if self._last_near >= 0:
            gpa, length, flags, _ = _unpack(table, offset)
            if flags == INDIRECT and length == _THREE_SIZE:
                table, last_offset, first = self._near, self._last_near, 0
                offset = gpa - self._near_gpa
        if not 0 <= offset <= last_offset:
            return None
        gpa, length, flags, following, gpa1, length1, flags1, next1, gpa2, length2, flags2, _ = (
            _unpack_three(table, offset)
        )
        if (
            flags == NEXT
            and following == first + 1
            and next1 == first + 2
            and flags2 == WRITE
            and length
            and length1
            and length2
        ):
            if flags1 == _NEXT_WRITE:
                return Chain(head, [(gpa, length)], [(gpa1, length1), (gpa2, length2)])
            if flags1 == NEXT:
                return Chain(head, [(gpa, length), (gpa1, length1)], [(gpa2, length2)])
        return None

    def _walk(self, head: int) -> Chain:
        """The chain at ``head``, of any shape; RingError if its structure is wrong."""
        readable, writable = collect(self._descriptors(head))
        return Chain(head, readable, writable)

    def _descriptors(self, head: int) -> Iterator[tuple[int, int, int]]:
        """``(gpa, length, flags)`` of each descriptor of the chain, those of an indirect table
        in place of the one that refers to it.

        "A driver MUST NOT create a descriptor chain longer than the Queue Size of the device"
        (2.7.5.3.1 "Driver Requirements: Indirect Descriptors"), which also ends every loop.
        """
        table, entries, index = self._table, self._size, head
        budget = self._size
        while True:
            if index >= entries:
                raise RingError(f"descriptor {index} in a table of {entries}")
            if not budget:
                raise RingError(f"descriptor chain is longer than the queue size {self._size}")
            gpa, length, flags, following = _unpack(table, index * DESCRIPTOR_SIZE)
            if flags & INDIRECT:
                # WRITE is ignored here, as 2.7.5.3.2 "Device Requirements" demands.
                if table is not self._table:
                    raise RingError("indirect descriptor inside an indirect table")
                if flags & NEXT:
                    raise RingError("descriptor with both INDIRECT and NEXT")
                table = self._indirect.at(gpa, length)
                entries, index = length // DESCRIPTOR_SIZE, 0
                continue
            budget -= 1
            yield gpa, length, flags
            if not flags & NEXT:
                return
            index = following
