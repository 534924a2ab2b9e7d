"""Packed virtqueues (virtio 1.2, 2.8 "Packed Virtqueues"), the driver's side."""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm.driver.errors import DeviceBrokenError
from pyvmm.driver.rings import Descriptor, ring_areas
from pyvmm.virtio.ring.chains import NEXT
from pyvmm.virtio.ring.queue import FullFence
from pyvmm.virtio.spec import EventFlags, PackedFlag

_AVAIL = int(PackedFlag.AVAIL)
_OWNER = int(PackedFlag.AVAIL | PackedFlag.USED)
_ENABLE = int(EventFlags.ENABLE)
_DISABLE = int(EventFlags.DISABLE)
_DESC = int(EventFlags.DESC)

_ID_SHIFT, _FLAGS_SHIFT = 32, 48  # of a descriptor's second 64-bit word: len, id, flags
# struct pvirtq_event_suppress as one 32-bit word: offset, wrap counter, flags.
_EVENT_SLOT_MASK, _EVENT_WRAP_SHIFT, _EVENT_FLAGS_SHIFT = 0x7FFF, 15, 16
_EVENT_FLAGS_MASK = 3


class PackedDriverRing:
    """A packed virtqueue of ``size`` entries in ``memory``; see ``DriverRing``.

    The memory is zeroed and laid out as ``ring_areas`` says.  A chain's head is its buffer ID.
    """

    def __init__(self, memory: memoryview, size: int, *, event_idx: bool) -> None:
        areas = ring_areas(size, packed=True)
        self._size = size
        self._event_idx = event_idx
        # Cast views read and write an element with one machine access.  struct goes bytewise, and
        # the device could see half a descriptor.
        self._ring = memory[: 16 * size].cast("Q")
        self._driver_event = memory[areas.driver : areas.driver + 4].cast("I")
        self._device_event = memory[areas.device : areas.device + 4].cast("I")

        self.free = size
        self._free_ids = list(range(size - 1, -1, -1))
        self._lengths = [0] * size  # of the chains in flight, in descriptors, by buffer ID
        # A slot of the ring, and the wrap counter: 1 in the first lap, then 0, then 1.
        self._slot, self._wrap = 0, 1
        self._used_slot, self._used_wrap = 0, 1
        self._unasked = 0  # descriptors pushed since notification_needed was last called
        self._interrupts = True
        self._event = _ENABLE << _EVENT_FLAGS_SHIFT
        self._full_fence = FullFence()
        self._ask_for_interrupt()

    @property
    def next_head(self) -> int:
        """See ``DriverRing.next_head``."""
        return self._free_ids[-1]

    def push_one(self, address: int, length: int, flags: int) -> None:
        """See ``DriverRing.push_one``."""
        buffer_id = self._free_ids.pop()
        self._lengths[buffer_id] = 1
        self.free -= 1
        self._unasked += 1
        slot = self._slot
        self._ring[2 * slot] = address
        flags |= _AVAIL if self._wrap else _OWNER ^ _AVAIL
        # x86 keeps stores in order, and this is one: whoever sees the flags sees all of it.
        self._ring[2 * slot + 1] = length | buffer_id << _ID_SHIFT | flags << _FLAGS_SHIFT
        slot += 1
        if slot == self._size:
            slot = 0
            self._wrap ^= 1
        self._slot = slot

    def push(self, chain: Sequence[Descriptor]) -> None:
        """See ``DriverRing.push``."""
        ring, count = self._ring, len(chain)
        buffer_id = self._free_ids.pop()
        self._lengths[buffer_id] = count
        self.free -= count
        self._unasked += count
        first, first_rest = self._slot, 0
        for index, (address, length, flags) in enumerate(chain):
            slot = self._slot
            if index < count - 1:
                flags |= NEXT
            flags |= _AVAIL if self._wrap else _OWNER ^ _AVAIL
            ring[2 * slot] = address
            rest = length | buffer_id << _ID_SHIFT | flags << _FLAGS_SHIFT
            if index:
                ring[2 * slot + 1] = rest
            else:
                first_rest = rest
            slot += 1
            if slot == self._size:
                slot = 0
                self._wrap ^= 1
            self._slot = slot
        # 2.8.21 "Supplying Buffers to The Device": the flags of the first descriptor come last,
        # because they make the whole chain available.
        ring[2 * first + 1] = first_rest

    def notification_needed(self) -> bool:
        """See ``DriverRing.notification_needed``."""
        pushed, self._unasked = self._unasked, 0
        if not pushed:
            return False
        # The device asks for notifications, then looks at the ring; here the order is reversed.
        # Without the fence both could miss the other's store.
        with self._full_fence:
            pass
        event = self._device_event[0]
        flags = event >> _EVENT_FLAGS_SHIFT & _EVENT_FLAGS_MASK
        if flags == _DESC and self._event_idx:
            # 2.8.10 "Driver and Device Event Suppression": only if this slot is among the last.
            back = self._slot - (event & _EVENT_SLOT_MASK)
            if event >> _EVENT_WRAP_SHIFT & 1 != self._wrap:
                back += self._size
            return 0 < back <= pushed
        return flags != _DISABLE

    def set_interrupts(self, enabled: bool) -> None:
        """See ``DriverRing.set_interrupts``."""
        self._interrupts = enabled
        self._ask_for_interrupt()

    def _ask_for_interrupt(self) -> bool:
        """Set the driver's event suppression to the wanted interrupts; True if that changed it.

        The device may then have used chains that it did not announce.
        """
        event = _DISABLE << _EVENT_FLAGS_SHIFT
        if self._interrupts:
            event = _ENABLE << _EVENT_FLAGS_SHIFT
            if self._event_idx:
                event = self._used_slot | self._used_wrap << _EVENT_WRAP_SHIFT
                event |= _DESC << _EVENT_FLAGS_SHIFT
        if event == self._event:
            return False
        self._driver_event[0] = self._event = event
        # The device uses a chain, then reads the word stored above.
        with self._full_fence:
            pass
        return True

    def take_used(self) -> list[int]:
        """See ``DriverRing.take_used``."""
        heads: list[int] = []
        while True:
            if problem := self._take(heads):
                if heads:  # they come first; the next call meets the problem again
                    return heads
                raise DeviceBrokenError(problem)
            if not self._ask_for_interrupt():
                return heads

    def _take(self, heads: list[int]) -> str:
        """Take the used descriptors and append their ``heads``, up to the first problem.

        Return the problem, or "".
        """
        ring, size, lengths = self._ring, self._size, self._lengths
        slot, wrap = self._used_slot, self._used_wrap
        used = _OWNER if wrap else 0
        while self.free < size:  # else nothing is in flight
            rest = ring[2 * slot + 1]
            if rest >> _FLAGS_SHIFT & _OWNER != used:
                break
            buffer_id = rest >> _ID_SHIFT & 0xFFFF
            length = lengths[buffer_id] if buffer_id < size else 0
            if not length:
                return f"used descriptor of buffer ID {buffer_id}, which is not in flight"
            lengths[buffer_id] = 0
            self._free_ids.append(buffer_id)
            self.free += length
            heads.append(buffer_id)
            slot += length
            if slot >= size:
                slot -= size
                wrap ^= 1
                used ^= _OWNER
            self._used_slot, self._used_wrap = slot, wrap
        return ""

    def release(self) -> None:
        """See ``DriverRing.release``."""
        for view in (self._ring, self._driver_event, self._device_event):
            view.release()
