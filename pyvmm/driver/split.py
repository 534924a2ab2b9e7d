"""Split virtqueues (virtio 1.2, 2.7 "Split Virtqueues"), the driver's side."""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm.driver.errors import DeviceBrokenError
from pyvmm.driver.rings import Descriptor, ring_areas
from pyvmm.virtio.ring.chains import NEXT
from pyvmm.virtio.ring.queue import FullFence
from pyvmm.virtio.spec import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY

_RING_HEADER_SIZE = 4  # le16 flags; le16 idx, in front of both rings
_FLAGS, _IDX = 0, 1  # of a ring header seen as two 16-bit words
_FLAGS_SHIFT, _NEXT_SHIFT = 32, 48  # of a descriptor's second 64-bit word: len, flags, next


class SplitDriverRing:
    """A split virtqueue of ``size`` entries, a power of 2, in ``memory``; see ``DriverRing``.

    The memory is zeroed and laid out as ``ring_areas`` says.
    """

    def __init__(self, memory: memoryview, size: int, *, event_idx: bool) -> None:
        areas = ring_areas(size, packed=False)
        self._size = size
        self._mask = size - 1
        self._event_idx = event_idx
        # Cast views read and write an element with one machine access.  struct goes bytewise, and
        # the device could see half an index.
        self._table = memory[: 16 * size].cast("Q")
        avail = memory[areas.driver :]
        used = memory[areas.device :]
        avail_end, used_end = _RING_HEADER_SIZE + 2 * size, _RING_HEADER_SIZE + 8 * size
        self._avail_header = avail[:_RING_HEADER_SIZE].cast("H")
        self._avail_ring = avail[_RING_HEADER_SIZE:avail_end].cast("H")
        self._used_event = avail[avail_end : avail_end + 2].cast("H")
        self._used_header = used[:_RING_HEADER_SIZE].cast("H")
        # One 64-bit word is a struct virtq_used_elem { le32 id; le32 len; }.
        self._used_ring = used[_RING_HEADER_SIZE:used_end].cast("Q")
        self._avail_event = used[used_end : used_end + 2].cast("H")
        avail.release()
        used.release()

        self.free = size
        # The last one is taken first, so the first chains of several lie in a row.
        self._free = list(range(size - 1, -1, -1))
        # By head, the descriptors of its chain in flight, last one first.
        self._chains: list[Sequence[int]] = [()] * size
        self._single_chains = [(index,) for index in range(size)]
        self._in_flight = 0
        self._next_avail = 0  # these count on; the ring has their low 16 bits
        self._asked_at = 0
        self._next_used = 0
        self._interrupts = True
        self._event = 0
        self._full_fence = FullFence()

    @property
    def next_head(self) -> int:
        """See ``DriverRing.next_head``."""
        return self._free[-1]

    def push_one(self, address: int, length: int, flags: int) -> None:
        """See ``DriverRing.push_one``."""
        head = self._free.pop()
        self.free -= 1
        self._table[2 * head] = address
        self._table[2 * head + 1] = length | flags << _FLAGS_SHIFT
        self._chains[head] = self._single_chains[head]
        self._publish(head)

    def push(self, chain: Sequence[Descriptor]) -> None:
        """See ``DriverRing.push``."""
        count = len(chain)
        indices = self._free[-count:]  # the head is the last of them
        del self._free[-count:]
        self.free -= count
        table, following = self._table, -1
        for index, (address, length, flags) in zip(indices, reversed(chain), strict=True):
            table[2 * index] = address
            rest = length | flags << _FLAGS_SHIFT
            if following >= 0:
                rest |= NEXT << _FLAGS_SHIFT | following << _NEXT_SHIFT
            table[2 * index + 1] = rest
            following = index
        self._chains[following] = indices
        self._publish(following)

    def _publish(self, head: int) -> None:
        """Make the chain ``head`` visible to the device.

        x86 keeps stores in order: the chain is visible before the entry, and the entry before idx.
        """
        position = self._next_avail
        self._avail_ring[position & self._mask] = head
        self._next_avail = position = position + 1
        self._in_flight += 1
        self._avail_header[_IDX] = position & 0xFFFF

    def notification_needed(self) -> bool:
        """See ``DriverRing.notification_needed``."""
        new, old = self._next_avail, self._asked_at
        if new == old:
            return False
        self._asked_at = new
        # The device asks for notifications, then looks at avail.idx; here the order is reversed.
        # Without the fence both could miss the other's store.
        with self._full_fence:
            pass
        if self._event_idx:
            # 2.7.10.1 "Driver Requirements: Available Buffer Notification Suppression": only if an
            # entry was put at the place of avail_event.
            return (self._avail_event[0] - old) & 0xFFFF < new - old
        return not self._used_header[_FLAGS] & USED_F_NO_NOTIFY

    def set_interrupts(self, enabled: bool) -> None:
        """See ``DriverRing.set_interrupts``.

        2.7.7.1 "Driver Requirements: Used Buffer Notification Suppression": with EVENT_IDX "the
        driver MUST set flags to 0", and used_event names the element that is announced.
        """
        self._interrupts = enabled
        if not self._event_idx:
            self._avail_header[_FLAGS] = 0 if enabled else AVAIL_F_NO_INTERRUPT
            with self._full_fence:
                pass
        else:
            self._ask_for_interrupt()

    def _ask_for_interrupt(self) -> bool:
        """Set used_event to the wanted interrupts; True if that changed it.

        The device may then have used chains that it did not announce.
        """
        if not self._event_idx:
            return False
        # The element before the next one is long used: the device needs 65536 more to reach it
        # again.
        event = (self._next_used if self._interrupts else self._next_used - 1) & 0xFFFF
        if event == self._event:
            return False
        self._used_event[0] = self._event = event
        # The device stores used.idx, then reads the word stored above.
        with self._full_fence:
            pass
        return True

    def take_used(self) -> list[int]:
        """See ``DriverRing.take_used``."""
        heads: list[int] = []
        while True:
            count = (self._used_header[_IDX] - self._next_used) & 0xFFFF
            if count and (problem := self._take(count, heads)):
                if heads:  # they come first; the next call meets the problem again
                    return heads
                raise DeviceBrokenError(problem)
            if not self._ask_for_interrupt():
                return heads

    def _take(self, count: int, heads: list[int]) -> str:
        """Take ``count`` used elements and append their ``heads``, up to the first problem.

        Return the problem, or "".
        """
        if count > self._in_flight:
            return f"used.idx is {count} ahead, with {self._in_flight} requests in flight"
        start = self._next_used & self._mask
        elements = self._used_ring[start : start + count].tolist()
        if len(elements) < count:
            elements += self._used_ring[: count - len(elements)].tolist()
        size, chains, free = self._size, self._chains, self._free
        for element in elements:
            head = element & 0xFFFF_FFFF
            chain = chains[head] if head < size else ()
            if not chain:
                return f"used element of id {head}, which is not in flight"
            chains[head] = ()
            free += chain
            self.free += len(chain)
            self._next_used += 1
            self._in_flight -= 1
            heads.append(head)
        return ""

    def release(self) -> None:
        """See ``DriverRing.release``."""
        for view in (
            self._table,
            self._avail_header,
            self._avail_ring,
            self._used_event,
            self._used_header,
            self._used_ring,
            self._avail_event,
        ):
            view.release()
