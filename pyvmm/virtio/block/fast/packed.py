"""A packed ring that hands out plain chains."""

from __future__ import annotations

import struct

from pyvmm.memory import GuestMemory
from pyvmm.virtio.block.fast.plain import PLAIN_MAX_BYTES, PLAIN_WORK, PlainChain
from pyvmm.virtio.block.fast.ring import FastRing
from pyvmm.virtio.block.fast.tables import PLAIN_SIZE, PlainTables
from pyvmm.virtio.block.request import HEADER_SIZE, STATUS_SIZE
from pyvmm.virtio.ring.chains import DESCRIPTOR, DESCRIPTOR_SIZE, INDIRECT, NEXT, WRITE
from pyvmm.virtio.ring.packed import (
    AVAIL,
    DESC,
    DISABLE,
    EVENT_FLAGS_MASK,
    EVENT_FLAGS_SHIFT,
    EVENT_PLACE_MASK,
    EVENT_WRAP,
    ID_MASK,
    ID_SHIFT,
    OWNER,
    SLOTS_SHIFT,
    PackedRing,
)
from pyvmm.virtio.ring.queue import DESCRIPTOR_WORK, Queue

_unpack = DESCRIPTOR.unpack_from
# A plain chain's flags are all there is of a link; the id is not looked at.
_LINKED = struct.Struct("@QI2xH")
_unpack_three = struct.Struct("@QI2xHQI2xHQIHH").unpack_from
_NOT_WRITE = 0xFFFF & ~WRITE


class FastPackedRing(PackedRing, FastRing):
    """``PackedRing``, and the methods of ``FastRing``."""

    def __init__(
        self, queue: Queue, memory: GuestMemory, *, indirect: bool, event_idx: bool
    ) -> None:
        super().__init__(queue, memory, indirect=indirect, event_idx=event_idx)
        # The flags of a plain chain in a table of its own: there "the VIRTQ_DESC_F_WRITE flags
        # bit is the only valid flag" (2.8.7).
        self._tables = PlainTables(
            memory, queue.descriptor_area, allowed=indirect, layout=_LINKED,
            reading=(0,) * queue.max_size, writing=(0,) + (WRITE,) * (queue.max_size - 1),
        )  # fmt: skip
        self.region, self.region_gpa = self._tables.region, self._tables.region_gpa
        # The last offsets at which a plain chain of one data buffer may begin.
        self._last_short = self._tables.last_short
        self._last_direct = DESCRIPTOR_SIZE * self._size - PLAIN_SIZE

    def take_lone(self) -> PlainChain | None:
        """Take the next chain if there is none behind it; see ``FastRing.take_lone``."""
        slot, available = self._avail_slot, self._available
        # Only when the owner bits are seen changed may the rest be read: x86 loads in order.
        if (
            self._flags[8 * slot] == available | INDIRECT
            and slot == self._used_slot
            and (available == AVAIL) == (self._used != 0)  # nothing is taken, so one may be
        ):
            behind, its_available = slot + 1, available
            if behind == self._size:
                behind, its_available = 0, available ^ OWNER
            if self._flags[8 * behind] & OWNER != its_available:
                gpa, length, buffer_id, _ = _unpack(self._ring, slot * DESCRIPTOR_SIZE)
                chain = self._tables.short(buffer_id | 1 << SLOTS_SHIFT, gpa, length)
                if chain is not None:
                    self._device_event[0] = DISABLE << EVENT_FLAGS_SHIFT
                    self._avail_slot, self._available = behind, its_available
                    return chain
        self.begin_pass()
        return None

    def answer_lone(self, token: int, written: int) -> bool:
        """Push and publish the one chain of a pass; see ``FastRing.answer_lone``."""
        slot, used = self._used_slot, self._used
        flags = used | WRITE if written else used
        self._rest[2 * slot] = written | (token & ID_MASK | flags << 16) << ID_SHIFT
        # It took one slot, and there is no other chain.
        self._used_slot = self._avail_slot
        self._used = OWNER if self._available == AVAIL else 0
        with self._full_fence:
            pass
        event = self._driver_event[0]
        event_flags = event >> EVENT_FLAGS_SHIFT & EVENT_FLAGS_MASK
        if event_flags == DESC and self._event_idx:
            return event & EVENT_PLACE_MASK == (slot | EVENT_WRAP if used else slot)
        return event_flags != DISABLE

    def take_plain(self, work_limit: int) -> tuple[list[PlainChain], int, bool]:
        """Take the plain chains that come next; see ``FastRing.take_plain``.

        They are in an indirect table in ``region``, or in three slots before the ring's end.
        """
        chains: list[PlainChain] = []
        ring, region, region_gpa, all_flags = self._ring, self.region, self.region_gpa, self._flags
        slot, available, budget = self._avail_slot, self._available, self._budget
        follows = False
        while work_limit > 0 and budget > 0:
            # Only when the owner bits are seen changed may the rest be read: x86 loads in order.
            flags = all_flags[8 * slot]
            if flags & OWNER != available:
                break
            follows = True  # unless it proves to be plain
            offset = slot * DESCRIPTOR_SIZE
            place: memoryview | None = None
            if flags == available | NEXT:
                if offset > self._last_direct:
                    break
                place, link, status_link, slots = ring, flags, available | WRITE, 3
            elif flags == available | INDIRECT:
                gpa, length, buffer_id, _ = _unpack(ring, offset)
                if length == PLAIN_SIZE:
                    offset = gpa - region_gpa
                    if not 0 <= offset <= self._last_short:
                        break
                    place, link, status_link = region, 0, WRITE
                slots = 1
            else:
                break
            if place is not None:
                (
                    header, header_length, first_link, data, length, data_link,
                    status, status_length, last_id, last_link,
                ) = _unpack_three(place, offset)
                if (
                    header_length != HEADER_SIZE
                    or first_link != link
                    or not 0 < length <= PLAIN_MAX_BYTES
                    or data_link & _NOT_WRITE != link
                    or status_length != STATUS_SIZE
                    or last_link != status_link
                ):
                    break
                # "Buffer ID is included in the last descriptor in the list" (2.8.6).
                token = last_id | 3 << SLOTS_SHIFT if slots == 3 else buffer_id | 1 << SLOTS_SHIFT
                chains.append((token, header, data, length, data_link & WRITE, status, ()))
            else:
                chain = self._tables.plain(buffer_id | 1 << SLOTS_SHIFT, gpa, length)
                if chain is None:
                    break
                chains.append(chain)
                length = chain[3] + (len(chain[6]) - 1) * DESCRIPTOR_WORK
            follows = False
            work_limit -= length + PLAIN_WORK
            budget -= slots
            slot += slots
            if slot == self._size:
                slot = 0
                available ^= OWNER
        self._budget, self._avail_slot, self._available = budget, slot, available
        return chains, work_limit, follows

    def push_plain(self, done: list[int]) -> None:
        """Remember plain chains as used; see ``FastRing.push_plain``."""
        self._done += done
