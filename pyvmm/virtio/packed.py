"""Packed virtqueues (virtio 1.2, 2.8 "Packed Virtqueues"), the device's side.

One ring of descriptors that both sides write: the driver puts a chain into the next free slots,
the device overwrites the first slot of the chain with a used descriptor.  Two bits in ``flags``
say whose a slot is, and they change meaning each time a side comes round the ring; whoever looks
has to know which lap it is in, and that is the wrap counter.

As in a split ring nothing is trusted twice: positions and wrap counters live in this object, a
descriptor is copied before it is looked at, and every walk is bounded by the queue size.
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
from pyvmm.virtio.spec import EventFlags, PackedFlag

_AVAIL = int(PackedFlag.AVAIL)
_USED = int(PackedFlag.USED)
_OWNER = _AVAIL | _USED

_unpack = DESCRIPTOR.unpack_from
_unpack_three = THREE_DESCRIPTORS.unpack_from
_THREE_SIZE = THREE_DESCRIPTORS.size

_ENABLE = int(EventFlags.ENABLE)
_DISABLE = int(EventFlags.DISABLE)
_DESC = int(EventFlags.DESC)

# struct pvirtq_desc { le64 addr; le32 len; le16 id; le16 flags; }
_FLAGS = 7  # as 16-bit words
_REST = 1  # as 64-bit words: len, id << 32, flags << 48
_ID_SHIFT, _FLAGS_SHIFT = 32, 48
# Ring.base: slot and wrap counter of what is next available, and above them of what is next used.
_BASE_SLOT_MASK, _BASE_WRAP, _BASE_USED_SHIFT = 0x7FFF, 1 << 15, 16
# struct pvirtq_event_suppress as one 32-bit word: offset, wrap counter, flags.
_EVENT_SIZE = 4
_EVENT_SLOT_MASK, _EVENT_WRAP_SHIFT, _EVENT_FLAGS_SHIFT = 0x7FFF, 15, 16
_EVENT_FLAGS_MASK = 3


class PackedRing:
    """A packed virtqueue in ``memory`` as ``queue``'s registers describe it; see ``queue.Ring``.

    Raises RingError when the registers do not describe one.  Any size up to the maximum will do:
    "The Queue Size value does not have to be a power of 2" (2.8.10.1 "Structure Size and
    Alignment").  ``indirect`` and ``event_idx`` say whether VIRTIO_F_INDIRECT_DESC and
    VIRTIO_F_EVENT_IDX were negotiated.
    """

    def __init__(
        self, queue: Queue, memory: GuestMemory, *, indirect: bool, event_idx: bool
    ) -> None:
        self._size = size = check_size(queue)
        self._event_idx = event_idx
        ring_bytes = DESCRIPTOR_SIZE * size
        self._ring = ring_area(memory, "descriptor ring", queue.descriptor_area, ring_bytes, 16)
        # Cast views read and write an element with one machine access; struct goes bytewise.
        self._flags = self._ring.cast("H")[_FLAGS:]
        self._rest = self._ring.cast("Q")[_REST:]
        driver_event = ring_area(
            memory, "driver event suppression", queue.driver_area, _EVENT_SIZE, 4
        )
        device_event = ring_area(
            memory, "device event suppression", queue.device_area, _EVENT_SIZE, 4
        )
        self._driver_event = driver_event.cast("I")
        self._device_event = device_event.cast("I")

        self._indirect = IndirectTables(memory, queue.descriptor_area, allowed=indirect)
        self._near, self._near_gpa = self._indirect.near, self._indirect.near_gpa
        may_be_indirect = indirect and size >= 3
        # Where a usual request may be read at once: see _usual.
        self._last_near = len(self._near) - _THREE_SIZE if may_be_indirect else -1
        self._last_direct = ring_bytes - _THREE_SIZE

        # A slot of the ring, and the owner bits of a descriptor that is available in this lap
        # (AVAIL while the wrap counter is 1, else USED) or used (both, else none).
        self._avail_slot, self._available = 0, _AVAIL
        self._used_slot, self._used = 0, _AVAIL | _USED
        if queue.base is not None:
            self._resume(queue.base)
        self._done: list[Chain] = []
        self._written: list[int] = []
        self._full_fence = FullFence()

    def _resume(self, base: int) -> None:
        """Go on at ``base``."""
        used = base >> _BASE_USED_SHIFT
        self._avail_slot, self._used_slot = base & _BASE_SLOT_MASK, used & _BASE_SLOT_MASK
        if not base & _BASE_WRAP:
            self._available = _USED
        if not used & _BASE_WRAP:
            self._used = 0
        if (
            max(self._avail_slot, self._used_slot) >= self._size
            or not 0 <= self._taken() <= self._size
        ):
            raise RingError(f"ring base {base:#x} is none of a queue of {self._size}")

    def _taken(self) -> int:
        """Slots that were taken and whose chains have not been published."""
        taken = self._avail_slot - self._used_slot
        if (self._available == _AVAIL) != (self._used == _AVAIL | _USED):
            taken += self._size
        return taken

    @property
    def base(self) -> int:
        """Both positions and their wrap counters; see ``Ring.base``."""
        avail = self._avail_slot | (_BASE_WRAP if self._available == _AVAIL else 0)
        used = self._used_slot | (_BASE_WRAP if self._used else 0)
        return avail | used << _BASE_USED_SHIFT

    def untake(self, chain: Chain) -> None:
        """The chain's slots back; see ``Ring.untake``."""
        slot = self._avail_slot - chain.slots
        if slot < 0:
            slot += self._size
            self._available ^= _OWNER
        self._avail_slot = slot

    def chains(self) -> Iterator[Chain]:
        """The chains that are available now; see ``Ring.chains``.

        There is no index that says how many they are: the first slot that is not available ends
        them.  The driver cannot add more than a ring of them before the used ones are published,
        and one that does so anyway is stopped after a ring of them.
        """
        self._device_event[0] = _DISABLE << _EVENT_FLAGS_SHIFT
        size, flags = self._size, self._flags
        # Slots that were taken and are held back are not the driver's to make available again.
        budget = size - self._taken()
        while budget > 0:
            slot, available = self._avail_slot, self._available
            # Only when the owner bits are seen changed may the rest be read: x86 loads in order.
            if flags[8 * slot] & _OWNER != available:
                return
            chain = self._usual(slot, available) or self._walk(slot, available)
            budget -= chain.slots
            # One at a time: chains that are not taken stay available.
            slot += chain.slots
            if slot >= size:
                slot -= size
                self._available = available ^ _OWNER
            self._avail_slot = slot
            yield chain

    def push(self, chain: Chain, written: int) -> None:
        """Remember ``chain`` as used with ``written`` bytes; see ``Ring.push``."""
        self._done.append(chain)
        self._written.append(written)

    def publish(self) -> bool:
        """Write the used descriptors, then ask whether to interrupt; see ``Ring.publish``."""
        if not self._done:
            return False
        size, rest = self._size, self._rest
        slot, used = old_slot, old_used = self._used_slot, self._used
        for chain, written in zip(self._done, self._written, strict=True):
            flags = used | WRITE if written else used
            # One store: when the driver sees the flags it sees the id and the length.
            rest[2 * slot] = written | chain.head << _ID_SHIFT | flags << _FLAGS_SHIFT
            slot += chain.slots
            if slot >= size:
                slot -= size
                used ^= _OWNER
        self._used_slot, self._used = slot, used
        self._done.clear()
        self._written.clear()
        # The driver asks for interrupts, then looks at the ring; here it is the other way about.
        # Without the fence both could miss the other's store, and the interrupt would be lost.
        self._full_fence()
        event = self._driver_event[0]
        event_flags = event >> _EVENT_FLAGS_SHIFT & _EVENT_FLAGS_MASK
        if event_flags == _DESC and self._event_idx:
            # 2.8.10: "Event will only trigger when this descriptor is made [...] used".
            advanced = slot - old_slot + (0 if used == old_used else size)
            event_used = _OWNER if event >> _EVENT_WRAP_SHIFT & 1 else 0
            distance = (event & _EVENT_SLOT_MASK) - old_slot
            distance += 0 if event_used == old_used else size
            return 0 <= distance < advanced
        # DESC is "only valid if VIRTIO_F_EVENT_IDX has been negotiated" and 3 is reserved: a
        # needless interrupt does no harm, a missing one stops the guest.
        return event_flags != _DISABLE

    def pending(self) -> bool:
        """Ask for a notification, then look at the next slot; see ``Ring.pending``."""
        slot, available = self._avail_slot, self._available
        event = _ENABLE << _EVENT_FLAGS_SHIFT
        if self._event_idx:
            wrap = int(available == _AVAIL)
            event = slot | wrap << _EVENT_WRAP_SHIFT | _DESC << _EVENT_FLAGS_SHIFT
        self._device_event[0] = event
        # The driver makes a descriptor available, then reads what was stored above.
        self._full_fence()
        return self._flags[8 * slot] & _OWNER == available

    def _usual(self, slot: int, available: int) -> Chain | None:
        """The chain at ``slot`` if it is a block request of one segment as every driver lays it
        out, direct or indirect: three full descriptors in a row.  None if it is not."""
        offset = slot * DESCRIPTOR_SIZE
        gpa, length, buffer_id, flags = _unpack(self._ring, offset)
        if flags == available | INDIRECT and length == _THREE_SIZE:
            table, offset, last_offset = self._near, gpa - self._near_gpa, self._last_near
            link, last, slots = 0, WRITE, 1
        elif flags == available | NEXT:
            table, last_offset = self._ring, self._last_direct
            link, last, slots = flags, available | WRITE, 3
        else:
            return None
        if not 0 <= offset <= last_offset:
            return None
        gpa, length, _, flags, gpa1, length1, _, flags1, gpa2, length2, last_id, flags2 = (
            _unpack_three(table, offset)
        )
        if not (flags == link and flags2 == last and length and length1 and length2):
            return None
        head = buffer_id if slots == 1 else last_id
        if flags1 == link | WRITE:
            return Chain(head, [(gpa, length)], [(gpa1, length1), (gpa2, length2)], slots)
        if flags1 == link:
            return Chain(head, [(gpa, length), (gpa1, length1)], [(gpa2, length2)], slots)
        return None

    def _walk(self, slot: int, available: int) -> Chain:
        """The chain at ``slot``, of any shape; RingError if its structure is wrong.

        "A driver MUST NOT create a descriptor list longer than the Queue Size" (2.8.17 "Driver
        Requirements: Scatter-Gather Support").
        """
        descriptors: list[tuple[int, int, int]] = []
        while len(descriptors) < self._size:
            gpa, length, buffer_id, flags = _unpack(self._ring, slot * DESCRIPTOR_SIZE)
            if flags & _OWNER != available:
                raise RingError(f"the chain goes on in slot {slot}, which is not available")
            if flags & INDIRECT:
                if flags & NEXT or descriptors:
                    raise RingError("indirect descriptor in a chain")
                return self._indirect_chain(buffer_id, gpa, length)
            descriptors.append((gpa, length, flags))
            if not flags & NEXT:
                # "Buffer ID is included in the last descriptor in the list" (2.8.6).
                return Chain(buffer_id, *collect(descriptors), len(descriptors))
            slot += 1
            if slot == self._size:
                slot = 0
                available ^= _OWNER
        raise RingError(f"descriptor chain is longer than the queue size {self._size}")

    def _indirect_chain(self, buffer_id: int, gpa: int, length: int) -> Chain:
        """The chain in the table of ``length`` bytes at ``gpa``: all of it, in order.

        "The VIRTQ_DESC_F_WRITE flags bit is the only valid flag for descriptors in the indirect
        table.  Others are reserved and are ignored by the device" (2.8.7 "Indirect Flag:
        Scatter-Gather Support").
        """
        table = self._indirect.at(gpa, length)
        if length // DESCRIPTOR_SIZE > self._size:
            raise RingError(f"descriptor chain is longer than the queue size {self._size}")
        descriptors = DESCRIPTOR.iter_unpack(table)
        return Chain(buffer_id, *collect((gpa, size, flags) for gpa, size, _, flags in descriptors))
