"""Packed virtqueues (virtio 1.2, 2.8 "Packed Virtqueues"), the device's side.

One ring of descriptors that both sides write: the driver puts a chain into the next free slots,
the device overwrites the first slot of the chain with a used descriptor.  Two bits in ``flags``
say whose a slot is, and they change meaning each time a side comes round the ring; whoever looks
has to know which lap it is in, and that is the wrap counter.

As in a split ring nothing is trusted twice: positions and wrap counters live in this object, a
descriptor is copied before it is looked at, and every walk is bounded by the queue size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from pyvmm.errors import RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.ring.chains import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    INDIRECT,
    NEXT,
    PLAIN_MAX_BYTES,
    PLAIN_SIZE,
    PLAIN_WORK,
    WRITE,
    IndirectTables,
    check_size,
    make_chain,
    ring_area,
)
from pyvmm.virtio.ring.queue import (
    DESCRIPTOR_WORK,
    PLAIN_HEADER_BYTES,
    PLAIN_STATUS_BYTES,
    SLOTS_SHIFT,
    TOKEN_BITS,
    Chain,
    FullFence,
    PlainChain,
    Queue,
)
from pyvmm.virtio.spec import EventFlags, PackedFlag

_AVAIL = int(PackedFlag.AVAIL)
_USED = int(PackedFlag.USED)
_OWNER = _AVAIL | _USED

_unpack = DESCRIPTOR.unpack_from
# For plain chains: the flags are all there is of a link, and the id is not looked at.
_LINKED = struct.Struct("@QI2xH")
_unpack_three = struct.Struct("@QI2xHQI2xHQIHH").unpack_from
_NOT_WRITE = 0xFFFF & ~WRITE

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
_EVENT_SLOT_MASK, _EVENT_WRAP, _EVENT_FLAGS_SHIFT = 0x7FFF, 1 << 15, 16
_EVENT_PLACE_MASK = 0xFFFF  # slot and wrap counter
_EVENT_FLAGS_MASK = 3
# A token is the buffer ID and above it the slots; what was written is above that.
_SLOTS_MASK = _ID_MASK = 0xFFFF


def packed_lengths(size: int) -> tuple[int, int, int]:
    """Bytes of descriptor ring, driver and device event suppression structure."""
    return DESCRIPTOR_SIZE * size, _EVENT_SIZE, _EVENT_SIZE


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

        # The flags of a plain chain in a table of its own: there "the VIRTQ_DESC_F_WRITE flags
        # bit is the only valid flag" (2.8.7).
        self._indirect = IndirectTables(
            memory, queue.descriptor_area, allowed=indirect, layout=_LINKED,
            reading=(0,) * queue.max_size, writing=(0,) + (WRITE,) * (queue.max_size - 1),
        )  # fmt: skip
        self.near, self.near_gpa = self._indirect.near, self._indirect.near_gpa
        # Where a plain chain of one data buffer may begin at last.
        self._last_short = self._indirect.last_short
        self._last_direct = ring_bytes - PLAIN_SIZE

        # A slot of the ring, and the owner bits of a descriptor that is available in this lap
        # (AVAIL while the wrap counter is 1, else USED) or used (both, else none).
        self._avail_slot, self._available = 0, _AVAIL
        self._used_slot, self._used = 0, _AVAIL | _USED
        self._lost = 0  # slots taken before this object was made, and not to be pushed by it
        if queue.base is not None:
            self._resume(queue.base)
        self._budget = 0  # slots that this pass may still take
        self._done: list[int] = []  # token | written << TOKEN_BITS
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

    def give_back(self) -> None:
        """Back to the first slot that was not pushed; see ``Ring.give_back``.

        Chains are pushed in the order they were taken, so those are the last slots.
        """
        pushed = sum(done >> SLOTS_SHIFT & _SLOTS_MASK for done in self._done)
        self._budget = 0
        slot = self._avail_slot - (self._taken() - self._lost - pushed)
        if slot < 0:
            slot += self._size
            self._available ^= _OWNER
        self._avail_slot = slot

    def chains(self) -> Iterator[Chain]:
        """The chains that are available now; see ``Ring.chains``."""
        self.begin()
        while (chain := self.walk()) is not None:
            yield chain

    def begin(self) -> None:
        """Work out how many slots may be available; see ``Ring.begin``.

        There is no index that says how many are: the first slot that is not available ends the
        pass.  The driver cannot add more than a ring of them before the used ones are published,
        and one that does so anyway is stopped after a ring of them.
        """
        self._device_event[0] = _DISABLE << _EVENT_FLAGS_SHIFT
        # Slots that were taken and are held back are not the driver's to make available again.
        self._budget = self._size - self._taken()

    def alone(self) -> PlainChain | None:
        """The chain in the next slot if there is none behind it; see ``Ring.alone``."""
        slot, available = self._avail_slot, self._available
        # Only when the owner bits are seen changed may the rest be read: x86 loads in order.
        if (
            self._flags[8 * slot] == available | INDIRECT
            and slot == self._used_slot
            and (available == _AVAIL) == (self._used != 0)  # nothing is taken, so one may be
        ):
            behind, its_available = slot + 1, available
            if behind == self._size:
                behind, its_available = 0, available ^ _OWNER
            if self._flags[8 * behind] & _OWNER != its_available:
                gpa, length, buffer_id, _ = _unpack(self._ring, slot * DESCRIPTOR_SIZE)
                chain = self._indirect.short(buffer_id | 1 << SLOTS_SHIFT, gpa, length)
                if chain is not None:
                    self._device_event[0] = _DISABLE << _EVENT_FLAGS_SHIFT
                    self._avail_slot, self._available = behind, its_available
                    return chain
        self.begin()
        return None

    def answer(self, token: int, written: int) -> bool:
        """What ``push`` and ``publish`` do, for the one chain of a pass; see ``Ring.answer``."""
        slot, used = self._used_slot, self._used
        flags = used | WRITE if written else used
        self._rest[2 * slot] = written | (token & _ID_MASK | flags << 16) << _ID_SHIFT
        # It took one slot, and there is no other chain.
        self._used_slot = self._avail_slot
        self._used = _OWNER if self._available == _AVAIL else 0
        with self._full_fence:
            pass
        event = self._driver_event[0]
        event_flags = event >> _EVENT_FLAGS_SHIFT & _EVENT_FLAGS_MASK
        if event_flags == _DESC and self._event_idx:
            return event & _EVENT_PLACE_MASK == (slot | _EVENT_WRAP if used else slot)
        return event_flags != _DISABLE

    def walk(self) -> Chain | None:
        """The chain at the next slot; see ``Ring.walk``."""
        slot, available = self._avail_slot, self._available
        # Only when the owner bits are seen changed may the rest be read: x86 loads in order.
        if self._budget <= 0 or self._flags[8 * slot] & _OWNER != available:
            return None
        chain = self._walk(slot, available)
        self._budget -= chain.slots
        # One at a time: chains that are not taken stay available.
        slot += chain.slots
        if slot >= self._size:
            slot -= self._size
            self._available = available ^ _OWNER
        self._avail_slot = slot
        return chain

    def plain(self, work_limit: int) -> tuple[list[PlainChain], int, bool]:
        """The plain chains that come next; see ``Ring.plain``.

        They are in an indirect table that is near, or in three slots before the ring's end.
        """
        chains: list[PlainChain] = []
        ring, near, near_gpa, all_flags = self._ring, self.near, self.near_gpa, self._flags
        slot, available, budget = self._avail_slot, self._available, self._budget
        other = False
        while work_limit > 0 and budget > 0:
            # Only when the owner bits are seen changed may the rest be read: x86 loads in order.
            flags = all_flags[8 * slot]
            if flags & _OWNER != available:
                break
            other = True  # unless it proves to be plain
            offset = slot * DESCRIPTOR_SIZE
            place: memoryview | None = None
            if flags == available | NEXT:
                if offset > self._last_direct:
                    break
                place, link, status_link, slots = ring, flags, available | WRITE, 3
            elif flags == available | INDIRECT:
                gpa, length, buffer_id, _ = _unpack(ring, offset)
                if length == PLAIN_SIZE:
                    offset = gpa - near_gpa
                    if not 0 <= offset <= self._last_short:
                        break
                    place, link, status_link = near, 0, WRITE
                slots = 1
            else:
                break
            if place is not None:
                (
                    header, header_length, first_link, data, length, data_link,
                    status, status_length, last_id, last_link,
                ) = _unpack_three(place, offset)
                if (
                    header_length != PLAIN_HEADER_BYTES
                    or first_link != link
                    or not 0 < length <= PLAIN_MAX_BYTES
                    or data_link & _NOT_WRITE != link
                    or status_length != PLAIN_STATUS_BYTES
                    or last_link != status_link
                ):
                    break
                # "Buffer ID is included in the last descriptor in the list" (2.8.6).
                token = last_id | 3 << SLOTS_SHIFT if slots == 3 else buffer_id | 1 << SLOTS_SHIFT
                chains.append((token, header, data, length, data_link & WRITE, status, ()))
            else:
                chain = self._indirect.plain(buffer_id | 1 << SLOTS_SHIFT, gpa, length)
                if chain is None:
                    break
                chains.append(chain)
                length = chain[3] + (len(chain[6]) - 1) * DESCRIPTOR_WORK
            other = False
            work_limit -= length + PLAIN_WORK
            budget -= slots
            slot += slots
            if slot == self._size:
                slot = 0
                available ^= _OWNER
        self._budget, self._avail_slot, self._available = budget, slot, available
        return chains, work_limit, other

    def push(self, chain: Chain, written: int) -> None:
        """Remember ``chain`` as used with ``written`` bytes; see ``Ring.push``."""
        token = chain.head | chain.slots << SLOTS_SHIFT
        self._done.append(token | written << TOKEN_BITS)

    def push_all(self, done: list[int]) -> None:
        """Remember all of them; see ``Ring.push_all``."""
        self._done += done

    def publish(self) -> bool:
        """Write the used descriptors, then ask whether to interrupt; see ``Ring.publish``."""
        if not self._done:
            return False
        size, rest = self._size, self._rest
        slot, used = old_slot, old_used = self._used_slot, self._used
        for done in self._done:
            written = done >> TOKEN_BITS
            flags = used | WRITE if written else used
            # One store: when the driver sees the flags it sees the id and the length.
            rest[2 * slot] = (
                written | (done & _ID_MASK) << _ID_SHIFT | flags << _FLAGS_SHIFT
            )
            slot += done >> SLOTS_SHIFT & _SLOTS_MASK
            if slot >= size:
                slot -= size
                used ^= _OWNER
        self._used_slot, self._used = slot, used
        self._done.clear()
        # The driver asks for interrupts, then looks at the ring; here it is the other way about.
        # Without the fence both could miss the other's store, and the interrupt would be lost.
        with self._full_fence:
            pass
        event = self._driver_event[0]
        event_flags = event >> _EVENT_FLAGS_SHIFT & _EVENT_FLAGS_MASK
        if event_flags == _DESC and self._event_idx:
            # 2.8.10: "Event will only trigger when this descriptor is made [...] used".
            advanced = slot - old_slot + (0 if used == old_used else size)
            event_used = _OWNER if event & _EVENT_WRAP else 0
            distance = (event & _EVENT_SLOT_MASK) - old_slot
            distance += 0 if event_used == old_used else size
            return 0 <= distance < advanced
        # DESC is "only valid if VIRTIO_F_EVENT_IDX has been negotiated" and 3 is reserved: a
        # needless interrupt does no harm, a missing one stops the guest.
        return event_flags != _DISABLE

    def pending(self) -> bool:
        """Ask for a notification, then look at the next slot; see ``Ring.pending``."""
        slot, available = self._avail_slot, self._available
        if self._event_idx:
            wrap = _EVENT_WRAP if available == _AVAIL else 0
            self._device_event[0] = slot | wrap | _DESC << _EVENT_FLAGS_SHIFT
        else:
            self._device_event[0] = _ENABLE << _EVENT_FLAGS_SHIFT
        # The driver makes a descriptor available, then reads what was stored above.
        with self._full_fence:
            pass
        return self._flags[8 * slot] & _OWNER == available

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
                return make_chain(buffer_id, descriptors, len(descriptors))
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
        if length // DESCRIPTOR_SIZE > self._indirect.longest:
            raise self._indirect.too_long()
        descriptors = DESCRIPTOR.iter_unpack(table)
        return make_chain(buffer_id, ((gpa, size, flags) for gpa, size, _, flags in descriptors))
