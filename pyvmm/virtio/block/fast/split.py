"""A split ring that hands out plain chains."""

from __future__ import annotations

import struct

from pyvmm.memory import GuestMemory
from pyvmm.virtio.block.fast.plain import PLAIN_MAX_BYTES, PLAIN_WORK, TOKEN_BITS, PlainChain
from pyvmm.virtio.block.fast.ring import FastRing
from pyvmm.virtio.block.fast.tables import FLAGS_MASK, PLAIN_SIZE, PlainTables
from pyvmm.virtio.block.request import HEADER_SIZE, STATUS_SIZE
from pyvmm.virtio.ring.chains import DESCRIPTOR_SIZE, INDIRECT, NEXT, WRITE
from pyvmm.virtio.ring.queue import DESCRIPTOR_WORK, Queue
from pyvmm.virtio.ring.split import FLAGS, IDX, SplitRing
from pyvmm.virtio.spec import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY

# A plain chain's flags and next as one number, the link.
_LINKED = struct.Struct("@QII")
_unpack_linked = _LINKED.unpack_from
_unpack_three = struct.Struct("@QIIQIIQII").unpack_from
_NEXT_SHIFT = 16
# The links of a plain chain of one data buffer that begins at index 0, but for the last.
_HEADER_LINK = NEXT | 1 << _NEXT_SHIFT
_DATA_LINK = NEXT | 2 << _NEXT_SHIFT  # and perhaps WRITE
_NOT_WRITE = 0xFFFF_FFFF & ~WRITE


class FastSplitRing(SplitRing, FastRing):
    """``SplitRing``, and the methods of ``FastRing``."""

    def __init__(
        self, queue: Queue, memory: GuestMemory, *, indirect: bool, event_idx: bool
    ) -> None:
        super().__init__(queue, memory, indirect=indirect, event_idx=event_idx)
        # The links of a plain chain in a table of its own.
        one, end = 1 << _NEXT_SHIFT, queue.max_size + 1 << _NEXT_SHIFT
        to_read = tuple(range(NEXT | one, NEXT | end, one))
        to_write = to_read[:1] + tuple(range(NEXT | WRITE | one * 2, NEXT | WRITE | end, one))
        self._tables = PlainTables(
            memory, queue.descriptor_area, allowed=indirect, layout=_LINKED,
            reading=to_read, writing=to_write,
        )  # fmt: skip
        self.region, self.region_gpa = self._tables.region, self._tables.region_gpa
        # The last offsets at which a plain chain of one data buffer may begin.
        self._last_short = self._tables.last_short
        self._last_direct = DESCRIPTOR_SIZE * self._size - PLAIN_SIZE

    def take_lone(self) -> PlainChain | None:
        """Take the one head that is new; see ``FastRing.take_lone``."""
        available, at = self._avail_header[IDX], self._next_avail
        # One more than are used: nothing for ``_new_heads`` to find but a head out of range.
        if available == (at + 1) & 0xFFFF and at == self._published:
            head = self._avail_ring[at & self._mask]
            if head < self._size:
                gpa, length, link = _unpack_linked(self._table, head * DESCRIPTOR_SIZE)
                if link & FLAGS_MASK == INDIRECT:
                    chain = self._tables.short(head, gpa, length)
                    if chain is not None:
                        if not self._event_idx:
                            self._used_header[FLAGS] = USED_F_NO_NOTIFY
                        self._next_avail = available
                        return chain
        self.begin_pass()
        return None

    def answer_lone(self, token: int, written: int) -> bool:
        """Push and publish the one chain of a pass; see ``FastRing.answer_lone``."""
        used = self._next_used
        self._used_ring[used & self._mask] = token | written << TOKEN_BITS
        self._used_header[IDX] = self._next_used = self._published = (used + 1) & 0xFFFF
        with self._full_fence:
            pass
        if self._event_idx:
            return self._used_event[0] == used
        return not self._avail_header[FLAGS] & AVAIL_F_NO_INTERRUPT

    def take_plain(self, work_limit: int) -> tuple[list[PlainChain], int, bool]:
        """Take the plain chains that come next; see ``FastRing.take_plain``.

        They are in an indirect table in ``region``, or three in a row in the descriptor table.
        """
        chains: list[PlainChain] = []
        table, region, region_gpa = self._table, self.region, self.region_gpa
        for head in self._heads[self._taken :]:
            offset = head * DESCRIPTOR_SIZE
            gpa, length, link = _unpack_linked(table, offset)
            place: memoryview | None = None
            if link & FLAGS_MASK != INDIRECT:
                if offset > self._last_direct:
                    break
                place, first = table, head << _NEXT_SHIFT
            elif length == PLAIN_SIZE:
                offset = gpa - region_gpa
                if not 0 <= offset <= self._last_short:
                    break
                place, first = region, 0
            if place is not None:
                (
                    header, header_length, header_link, data, length, data_link,
                    status, status_length, status_link,
                ) = _unpack_three(place, offset)
                if (
                    header_length != HEADER_SIZE
                    or header_link - first != _HEADER_LINK
                    or not 0 < length <= PLAIN_MAX_BYTES
                    or (data_link & _NOT_WRITE) - first != _DATA_LINK
                    or status_length != STATUS_SIZE
                    or status_link & FLAGS_MASK != WRITE
                ):
                    break
                chains.append((head, header, data, length, data_link & WRITE, status, ()))
            else:
                chain = self._tables.plain(head, gpa, length)
                if chain is None:
                    break
                chains.append(chain)
                length = chain[3] + (len(chain[6]) - 1) * DESCRIPTOR_WORK
            work_limit -= length + PLAIN_WORK
            if work_limit <= 0:
                break
        self._taken += len(chains)
        self._next_avail = (self._next_avail + len(chains)) & 0xFFFF
        return chains, work_limit, self._taken < len(self._heads)

    def push_plain(self, done: list[int]) -> None:
        """Put plain chains into the used ring; see ``FastRing.push_plain``."""
        used, mask, ring = self._next_used, self._mask, self._used_ring
        for element in done:  # a token is a head, so this is the used element
            ring[used & mask] = element
            used += 1
        self._next_used = used & 0xFFFF
