"""Split virtqueues (virtio 1.2, 2.7 "Split Virtqueues"), the device's side.

Three areas in guest memory: the descriptor table and the available ring, written by the driver,
and the used ring, written here.  Nothing the guest can write is trusted twice: indices of the
device's own progress live in this object, a descriptor is copied before it is looked at, and
every walk is bounded by the queue's size, or in a table of its own by the largest there may be.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.errors import RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.ring.chains import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    INDIRECT,
    NEXT,
    IndirectTables,
    check_size,
    make_chain,
    ring_area,
)
from pyvmm.virtio.ring.queue import Chain, FullFence, Queue
from pyvmm.virtio.spec import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY

_RING_HEADER_SIZE = 4  # le16 flags; le16 idx, in front of both rings
_EVENT_SIZE = 2  # le16 used_event or avail_event, behind both rings
FLAGS, IDX = 0, 1  # of a ring header seen as two 16-bit words

_unpack = DESCRIPTOR.unpack_from


def split_lengths(size: int, *, event_idx: bool) -> tuple[int, int, int]:
    """Return the bytes of descriptor table, available and used ring of ``size`` entries.

    2.7 "Split Virtqueues": the two event fields are there "only if VIRTIO_F_EVENT_IDX"."""
    event = _EVENT_SIZE if event_idx else 0
    rings = _RING_HEADER_SIZE + 2 * size + event, _RING_HEADER_SIZE + 8 * size + event
    return DESCRIPTOR_SIZE * size, *rings


class SplitRing:
    """A split virtqueue in ``memory`` as ``queue``'s registers describe it; see ``queue.Ring``.

    Raises RingError when the registers do not describe one.  ``indirect`` and ``event_idx`` are
    true if VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX were negotiated.
    """

    def __init__(
        self, queue: Queue, memory: GuestMemory, *, indirect: bool, event_idx: bool
    ) -> None:
        self._size = size = check_size(queue)
        if size & (size - 1):
            raise RingError(f"queue size {size} is not a power of 2")
        self._mask = size - 1
        self._event_idx = event_idx

        table_bytes, avail_bytes, used_bytes = split_lengths(size, event_idx=True)
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

        self._indirect = IndirectTables(memory, allowed=indirect, longest=queue.max_size)

        self._heads: list[int] = []  # of this pass
        self._taken = 0  # how many of them have been taken
        self._next_avail = self._next_used = self._published = 0
        self._lost = 0  # taken before this object was made, and not to be pushed by it
        self._held: list[int] = []  # heads taken in earlier passes and not pushed
        if queue.base is not None:
            self._resume(queue.base)
        self._full_fence = FullFence()

    def _resume(self, base: int) -> None:
        """Go on at ``base``; the used ring has the used index."""
        used = self._used_header[IDX]
        if not base <= 0xFFFF or (base - used) & 0xFFFF > self._size:
            raise RingError(
                f"ring base {base} is not within {self._size} of the used index {used}"
            )
        self._next_avail = base
        self._next_used = self._published = used
        self._lost = (base - used) & 0xFFFF

    @property
    def base(self) -> int:
        """Return the available index; see ``Ring.base``."""
        return self._next_avail

    def save(self) -> dict[str, object]:
        """Return the available and the used index; see ``Ring.save``."""
        available = self._next_used + self._lost & 0xFFFF
        return {"available": available, "used": self._next_used}

    def restore(self, data: object) -> None:
        """Go on at these indices; see ``Ring.restore``."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("split ring", data)
        available = fields.integer("available", 0, 0xFFFF)
        used = fields.integer("used", 0, 0xFFFF)
        fields.end()
        lost = (available - used) & 0xFFFF
        if lost > self._size:
            raise fields.error("available", f"is {lost} ahead of used, of a size of {self._size}")
        self._next_avail, self._next_used, self._published = available, used, used
        self._lost, self._taken = lost, 0
        self._heads, self._held = [], []

    def untake(self) -> None:
        """Go back to the first entry that was not pushed; see ``Ring.untake``.

        Chains are pushed in the order they were taken, so those are the last ones.
        """
        self._next_avail = (self._next_used + self._lost) & 0xFFFF
        self._heads, self._held = [], []
        self._taken = 0

    def take_chains(self) -> Iterator[Chain]:
        """Take the chains that are available now; see ``Ring.take_chains``."""
        self.begin_pass()
        while (chain := self.take_next()) is not None:
            yield chain

    def begin_pass(self) -> None:
        """Ask the driver not to notify; look at avail.idx, once for the whole pass.  RingError."""
        if not self._event_idx:
            self._used_header[FLAGS] = USED_F_NO_NOTIFY
        # With EVENT_IDX flags are 0; avail_event stays behind, which keeps the driver quiet too.
        self._heads = self._new_heads()
        self._taken = 0

    def take_next(self) -> Chain | None:
        """Take the chain at the next head, of any shape; None after the last.  RingError."""
        if self._taken == len(self._heads):
            return None
        head = self._heads[self._taken]
        # One at a time: chains that are not taken stay available.
        self._taken += 1
        self._next_avail = (self._next_avail + 1) & 0xFFFF
        return make_chain(head, self._descriptors(head))

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
        self._used_header[IDX] = self._published = new
        # The driver asks for interrupts, then looks at used.idx; here it is the other way about.
        # Without the fence both could miss the other's store, and the interrupt would be lost.
        with self._full_fence:
            pass
        if self._event_idx:
            # 2.7.7.2 "Device Requirements: Used Buffer Notification Suppression": if an element
            # was put where used_event points, "the device MUST send a notification".
            return (self._used_event[0] - old) & 0xFFFF < (new - old) & 0xFFFF
        return not self._avail_header[FLAGS] & AVAIL_F_NO_INTERRUPT

    def enable_notifications(self) -> bool:
        """Ask for a notification, then compare avail.idx; see ``Ring.enable_notifications``."""
        if self._event_idx:
            self._avail_event[0] = self._next_avail
        else:
            self._used_header[FLAGS] = 0
        # The driver stores avail.idx, then reads what was stored above.
        with self._full_fence:
            pass
        return self._avail_header[IDX] != self._next_avail

    def _new_heads(self) -> list[int]:
        """Return a copy of the available ring's new entries; RingError if they cannot be."""
        available = self._avail_header[IDX]
        count = (available - self._next_avail) & 0xFFFF
        # Ahead of what was given back: a chain that was taken and is held back still counts.
        ahead = (available - self._published) & 0xFFFF
        held = self._keep_held(ahead - count - self._lost) if ahead != count else []
        if not count:
            return []
        if ahead > self._size:
            raise RingError(f"avail.idx is {ahead} ahead in a queue of {self._size}")
        start = self._next_avail & self._mask
        if count == 1:
            heads = [self._avail_ring[start]]
        else:
            heads = self._avail_ring[start : start + count].tolist()
            if len(heads) < count:
                heads += self._avail_ring[: count - len(heads)].tolist()
        if max(heads) >= self._size:
            raise RingError(f"avail entry {max(heads)} in a queue of {self._size}")
        if len({*heads, *held}) < count + len(held):
            # All of them are outstanding at this moment, so the driver lost count.
            raise RingError("the same head is available twice")
        return heads

    def _keep_held(self, count: int) -> list[int]:
        """Remember and return the heads of the last ``count`` chains that earlier passes took:
        those that were not published."""
        taken = self._held + self._heads[: self._taken]
        self._held = taken[-count:] if count else []
        return self._held

    def _descriptors(self, head: int) -> Iterator[tuple[int, int, int]]:
        """Yield ``(gpa, length, flags)`` of each descriptor of the chain at ``head``.

        The descriptors of an indirect table come in place of the one that refers to it.

        "A driver MUST NOT create a descriptor chain longer than the Queue Size of the device"
        (2.7.5.3.1 "Driver Requirements: Indirect Descriptors"), which also ends every loop.  With
        a table that is the size the device has at most: see ``IndirectTables``.
        """
        table, entries, index = self._table, self._size, head
        budget = self._size
        while True:
            if index >= entries:
                raise RingError(f"descriptor {index} in a table of {entries}")
            if not budget and table is not self._table:
                raise self._indirect.too_long()
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
                budget += self._indirect.longest - self._size
                continue
            budget -= 1
            yield gpa, length, flags
            if not flags & NEXT:
                return
            index = following
