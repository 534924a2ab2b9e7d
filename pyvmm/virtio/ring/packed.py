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
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.virtio.ring.chains import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    INDIRECT,
    NEXT,
    WRITE,
    IndirectTables,
    check_size,
    make_chain,
    ring_area,
)
from pyvmm.virtio.ring.queue import Chain, FullFence, Queue
from pyvmm.virtio.spec import EventFlags, PackedFlag

if TYPE_CHECKING:
    from pyvmm.state import Fields

AVAIL = int(PackedFlag.AVAIL)
_USED = int(PackedFlag.USED)
OWNER = AVAIL | _USED

_unpack = DESCRIPTOR.unpack_from
_ENABLE = int(EventFlags.ENABLE)
DISABLE = int(EventFlags.DISABLE)
DESC = int(EventFlags.DESC)

# struct pvirtq_desc { le64 addr; le32 len; le16 id; le16 flags; }
_FLAGS = 7  # as 16-bit words
_REST = 1  # as 64-bit words: len, id << 32, flags << 48
ID_SHIFT, _FLAGS_SHIFT = 32, 48
# Ring.base: slot and wrap counter of what is next available, and above them of what is next used.
_BASE_SLOT_MASK, _BASE_WRAP, _BASE_USED_SHIFT = 0x7FFF, 1 << 15, 16
# struct pvirtq_event_suppress as one 32-bit word: offset, wrap counter, flags.
_EVENT_SIZE = 4
_EVENT_SLOT_MASK, EVENT_WRAP, EVENT_FLAGS_SHIFT = 0x7FFF, 1 << 15, 16
EVENT_PLACE_MASK = 0xFFFF  # slot and wrap counter
EVENT_FLAGS_MASK = 3
# An element of PackedRing._done: the buffer ID, the slots of the chain, the bytes written.
ID_MASK, SLOTS_SHIFT, WRITTEN_SHIFT = 0xFFFF, 16, 32
_SLOTS_MASK = 0xFFFF


def packed_lengths(size: int) -> tuple[int, int, int]:
    """Return the bytes of descriptor ring, driver and device event suppression structure."""
    return DESCRIPTOR_SIZE * size, _EVENT_SIZE, _EVENT_SIZE


class PackedRing:
    """A packed virtqueue in ``memory`` as ``queue``'s registers describe it; see ``queue.Ring``.

    Raises RingError when the registers do not describe one.  Any size up to the maximum will do:
    "The Queue Size value does not have to be a power of 2" (2.8.10.1 "Structure Size and
    Alignment").  ``indirect`` and ``event_idx`` are true if VIRTIO_F_INDIRECT_DESC and
    VIRTIO_F_EVENT_IDX were negotiated.
    """

    def __init__(
        self, queue: Queue, memory: GuestMemory, *, indirect: bool, event_idx: bool
    ) -> None:
        self._size = size = check_size(queue)
        self._event_idx = event_idx
        ring_bytes = packed_lengths(size)[0]
        self._ring = ring_area(memory, "descriptor ring", queue.descriptor_area, ring_bytes, 16)
        # Cast views read and write an element with one machine access; struct goes bytewise.
        self._flags = self._ring.cast("H")[_FLAGS:]
        self._rest = self._ring.cast("Q")[_REST:]
        self._driver_event = ring_area(
            memory, "driver event suppression", queue.driver_area, _EVENT_SIZE, 4
        ).cast("I")
        self._device_event = ring_area(
            memory, "device event suppression", queue.device_area, _EVENT_SIZE, 4
        ).cast("I")

        self._indirect = IndirectTables(memory, allowed=indirect, longest=queue.max_size)

        # A slot of the ring, and the owner bits of a descriptor that is available in this lap
        # (AVAIL while the wrap counter is 1, else USED) or used (both, else none).
        self._avail_slot, self._available = 0, AVAIL
        self._used_slot, self._used = 0, AVAIL | _USED
        self._lost = 0  # slots taken before this object was made, and not to be pushed by it
        if queue.base is not None:
            self._resume(queue.base)
        self._budget = 0  # slots that this pass may still take
        self._done: list[int] = []  # pushed and not yet published
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
        self._lost = self._taken()

    def _taken(self) -> int:
        """Return the number of slots whose chains were taken and have not been published."""
        taken = self._avail_slot - self._used_slot
        if (self._available == AVAIL) != (self._used == AVAIL | _USED):
            taken += self._size
        return taken

    @property
    def base(self) -> int:
        """Return both positions and their wrap counters; see ``Ring.base``."""
        avail = self._avail_slot | (_BASE_WRAP if self._available == AVAIL else 0)
        used = self._used_slot | (_BASE_WRAP if self._used else 0)
        return avail | used << _BASE_USED_SHIFT

    def save(self) -> dict[str, object]:
        """Return both positions and their wrap counters; see ``Ring.save``."""
        slot, available = self._used_slot + self._lost, AVAIL if self._used else _USED
        if slot >= self._size:
            slot -= self._size
            available ^= OWNER
        return {
            "available_slot": slot, "available_wrap": available == AVAIL,
            "used_slot": self._used_slot, "used_wrap": bool(self._used),
        }

    def restore(self, data: object) -> None:
        """Go on at these positions; see ``Ring.restore``."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("packed ring", data)
        slot, wrap = self._place(fields, "available")
        used_slot, used_wrap = self._place(fields, "used")
        fields.end()
        lost = slot - used_slot + (self._size if wrap != used_wrap else 0)
        if not 0 <= lost <= self._size:
            raise fields.error(
                "available_slot", f"is {lost} ahead of used_slot, of a size of {self._size}"
            )
        self._avail_slot, self._available = slot, AVAIL if wrap else _USED
        self._used_slot, self._used = used_slot, OWNER if used_wrap else 0
        self._lost, self._budget = lost, 0
        self._done.clear()

    def _place(self, fields: Fields, name: str) -> tuple[int, bool]:
        """Return a slot and its wrap counter."""
        return (
            fields.integer(f"{name}_slot", 0, self._size - 1), fields.boolean(f"{name}_wrap")
        )

    def untake(self) -> None:
        """Go back to the first slot that was not pushed; see ``Ring.untake``.

        Chains are pushed in the order they were taken, so those are the last slots.
        """
        pushed = sum(done >> SLOTS_SHIFT & _SLOTS_MASK for done in self._done)
        self._budget = 0
        slot = self._avail_slot - (self._taken() - self._lost - pushed)
        if slot < 0:
            slot += self._size
            self._available ^= OWNER
        self._avail_slot = slot

    def take_chains(self) -> Iterator[Chain]:
        """Take the chains that are available now; see ``Ring.take_chains``."""
        self.begin_pass()
        while (chain := self.take_next()) is not None:
            yield chain

    def begin_pass(self) -> None:
        """Ask the driver not to notify; work out how many slots may be available.

        There is no index that says how many are: the first slot that is not available ends the
        pass.  The driver cannot add more than a ring of them before the used ones are published,
        and one that does so anyway is stopped after a ring of them.
        """
        self._device_event[0] = DISABLE << EVENT_FLAGS_SHIFT
        # Slots that were taken and are held back are not the driver's to make available again.
        self._budget = self._size - self._taken()

    def take_next(self) -> Chain | None:
        """Take the chain at the next slot, of any shape; None after the last.  RingError."""
        slot, available = self._avail_slot, self._available
        # Only when the owner bits are seen changed may the rest be read: x86 loads in order.
        if self._budget <= 0 or self._flags[8 * slot] & OWNER != available:
            return None
        chain = self._chain_at(slot, available)
        self._budget -= chain.slots
        # One at a time: chains that are not taken stay available.
        slot += chain.slots
        if slot >= self._size:
            slot -= self._size
            self._available = available ^ OWNER
        self._avail_slot = slot
        return chain

    def push(self, chain: Chain, written: int) -> None:
        """Remember ``chain`` as used with ``written`` bytes; see ``Ring.push``."""
        self._done.append(chain.head | chain.slots << SLOTS_SHIFT | written << WRITTEN_SHIFT)

    def publish(self) -> bool:
        """Write the used descriptors, then ask whether to interrupt; see ``Ring.publish``."""
        if not self._done:
            return False
        size, rest = self._size, self._rest
        slot, used = old_slot, old_used = self._used_slot, self._used
        for done in self._done:
            written = done >> WRITTEN_SHIFT
            flags = used | WRITE if written else used
            # One store: when the driver sees the flags it sees the id and the length.
            rest[2 * slot] = (
                written | (done & ID_MASK) << ID_SHIFT | flags << _FLAGS_SHIFT
            )
            slot += done >> SLOTS_SHIFT & _SLOTS_MASK
            if slot >= size:
                slot -= size
                used ^= OWNER
        self._used_slot, self._used = slot, used
        self._done.clear()
        # The driver asks for interrupts, then looks at the ring; here it is the other way about.
        # Without the fence both could miss the other's store, and the interrupt would be lost.
        with self._full_fence:
            pass
        event = self._driver_event[0]
        event_flags = event >> EVENT_FLAGS_SHIFT & EVENT_FLAGS_MASK
        if event_flags == DESC and self._event_idx:
            # 2.8.10: "Event will only trigger when this descriptor is made [...] used".
            advanced = slot - old_slot + (0 if used == old_used else size)
            event_used = OWNER if event & EVENT_WRAP else 0
            distance = (event & _EVENT_SLOT_MASK) - old_slot
            distance += 0 if event_used == old_used else size
            return 0 <= distance < advanced
        # DESC is "only valid if VIRTIO_F_EVENT_IDX has been negotiated" and 3 is reserved: a
        # needless interrupt does no harm, a missing one stops the guest.
        return event_flags != DISABLE

    def enable_notifications(self) -> bool:
        """Ask for a notification, then look at the next slot; see ``Ring.enable_notifications``."""
        slot, available = self._avail_slot, self._available
        if self._event_idx:
            wrap = EVENT_WRAP if available == AVAIL else 0
            self._device_event[0] = slot | wrap | DESC << EVENT_FLAGS_SHIFT
        else:
            self._device_event[0] = _ENABLE << EVENT_FLAGS_SHIFT
        # The driver makes a descriptor available, then reads what was stored above.
        with self._full_fence:
            pass
        return self._flags[8 * slot] & OWNER == available

    def _chain_at(self, slot: int, available: int) -> Chain:
        """Return the chain at ``slot``, of any shape; RingError if its structure is wrong.

        "A driver MUST NOT create a descriptor list longer than the Queue Size" (2.8.17 "Driver
        Requirements: Scatter-Gather Support").
        """
        descriptors: list[tuple[int, int, int]] = []
        while len(descriptors) < self._size:
            gpa, length, buffer_id, flags = _unpack(self._ring, slot * DESCRIPTOR_SIZE)
            if flags & OWNER != available:
                raise RingError(f"the chain goes on in slot {slot}, which is not available")
            if flags & INDIRECT:
                if flags & NEXT or descriptors:
                    raise RingError("indirect descriptor in a chain")
                return self._indirect_chain(buffer_id, gpa, length)
            descriptors.append((gpa, length, flags))
            if not flags & NEXT:
                # "Buffer ID is included in the last descriptor in the list" (2.8.6).
                return make_chain(buffer_id, descriptors, len(descriptors))
            slot += 1
            if slot == self._size:
                slot = 0
                available ^= OWNER
        raise RingError(f"descriptor chain is longer than the queue size {self._size}")

    def _indirect_chain(self, buffer_id: int, gpa: int, length: int) -> Chain:
        """Return the chain in the table of ``length`` bytes at ``gpa``: all of it, in order.

        "The VIRTQ_DESC_F_WRITE flags bit is the only valid flag for descriptors in the indirect
        table.  Others are reserved and are ignored by the device" (2.8.7 "Indirect Flag:
        Scatter-Gather Support").
        """
        table = self._indirect.at(gpa, length)
        if length // DESCRIPTOR_SIZE > self._indirect.longest:
            raise self._indirect.too_long()
        descriptors = DESCRIPTOR.iter_unpack(table)
        return make_chain(buffer_id, ((gpa, size, flags) for gpa, size, _, flags in descriptors))
