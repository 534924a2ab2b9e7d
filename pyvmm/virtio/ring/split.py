"""Split virtqueues (virtio 1.2, 2.7 "Split Virtqueues"), the device's side.

Three areas in guest memory: the descriptor table and the available ring, written by the driver,
and the used ring, written here.  Nothing the guest can write is trusted twice: indices of the
device's own progress live in this object, a descriptor is copied before it is looked at, and
every walk is bounded by the queue's size, or in a table of its own by the largest there may be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from pyvmm.errors import RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.ring.chains import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    FLAGS_MASK,
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
    TOKEN_BITS,
    Chain,
    FullFence,
    PlainChain,
    Queue,
)
from pyvmm.virtio.spec import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY

_RING_HEADER_SIZE = 4  # le16 flags; le16 idx, in front of both rings
_EVENT_SIZE = 2  # le16 used_event or avail_event, behind both rings
_FLAGS, _IDX = 0, 1  # of a ring header seen as two 16-bit words

_unpack = DESCRIPTOR.unpack_from
# For plain chains: flags and next as one number, the link.
_LINKED = struct.Struct("@QII")
_unpack_linked = _LINKED.unpack_from
_unpack_three = struct.Struct("@QIIQIIQII").unpack_from
_NEXT_SHIFT = 16
# The links of a plain chain of one data buffer that begins at index 0, but for the last.
_HEADER_LINK = NEXT | 1 << _NEXT_SHIFT
_DATA_LINK = NEXT | 2 << _NEXT_SHIFT  # and perhaps WRITE
_NOT_WRITE = 0xFFFF_FFFF & ~WRITE


def split_lengths(size: int, *, event_idx: bool) -> tuple[int, int, int]:
    """Bytes of descriptor table, available and used ring of ``size`` entries (2.7 "Split
    Virtqueues"); the two event fields are there "only if VIRTIO_F_EVENT_IDX"."""
    event = _EVENT_SIZE if event_idx else 0
    rings = _RING_HEADER_SIZE + 2 * size + event, _RING_HEADER_SIZE + 8 * size + event
    return DESCRIPTOR_SIZE * size, *rings


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

        # The links of a plain chain in a table of its own.
        to_read = tuple(NEXT | index + 1 << _NEXT_SHIFT for index in range(queue.max_size))
        to_write = to_read[:1] + tuple(link | WRITE for link in to_read[1:])
        self._indirect = IndirectTables(
            memory, queue.descriptor_area, allowed=indirect, layout=_LINKED,
            reading=to_read, writing=to_write,
        )  # fmt: skip
        self.near, self.near_gpa = self._indirect.near, self._indirect.near_gpa
        # Where a plain chain of one data buffer may begin at last.
        self._last_short = self._indirect.last_short
        self._last_direct = table_bytes - PLAIN_SIZE

        self._heads: list[int] = []  # of this pass
        self._taken = 0  # how many of them have been taken
        self._next_avail = self._next_used = self._published = 0
        self._lost = 0  # taken before this object was made, and not to be pushed by it
        self._held: list[int] = []  # heads taken in earlier passes and not pushed
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
        self._lost = (base - used) & 0xFFFF

    @property
    def base(self) -> int:
        """The available index; see ``Ring.base``."""
        return self._next_avail

    def give_back(self) -> None:
        """Back to the first entry that was not pushed; see ``Ring.give_back``.

        Chains are pushed in the order they were taken, so those are the last ones.
        """
        self._next_avail = (self._next_used + self._lost) & 0xFFFF
        self._heads, self._held = [], []
        self._taken = 0

    def chains(self) -> Iterator[Chain]:
        """The chains that are available now; see ``Ring.chains``."""
        self.begin()
        while (chain := self.walk()) is not None:
            yield chain

    def begin(self) -> None:
        """Look at avail.idx, for the whole pass; see ``Ring.begin``."""
        if not self._event_idx:
            self._used_header[_FLAGS] = USED_F_NO_NOTIFY
        # With EVENT_IDX flags are 0; avail_event stays behind, which keeps the driver quiet too.
        self._heads = self._waiting_heads()
        self._taken = 0

    def alone(self) -> PlainChain | None:
        """The one head that is new; see ``Ring.alone``."""
        available, at = self._avail_header[_IDX], self._next_avail
        # One more than are used: nothing for ``_waiting_heads`` to find but a head out of range.
        if available == (at + 1) & 0xFFFF and at == self._published:
            head = self._avail_ring[at & self._mask]
            if head < self._size:
                gpa, length, link = _unpack_linked(self._table, head * DESCRIPTOR_SIZE)
                if link & FLAGS_MASK == INDIRECT:
                    chain = self._indirect.short(head, gpa, length)
                    if chain is not None:
                        if not self._event_idx:
                            self._used_header[_FLAGS] = USED_F_NO_NOTIFY
                        self._next_avail = available
                        return chain
        self.begin()
        return None

    def answer(self, token: int, written: int) -> bool:
        """What ``push`` and ``publish`` do, for the one chain of a pass; see ``Ring.answer``."""
        used = self._next_used
        self._used_ring[used & self._mask] = token | written << TOKEN_BITS
        self._used_header[_IDX] = self._next_used = self._published = (used + 1) & 0xFFFF
        with self._full_fence:
            pass
        if self._event_idx:
            return self._used_event[0] == used
        return not self._avail_header[_FLAGS] & AVAIL_F_NO_INTERRUPT

    def walk(self) -> Chain | None:
        """The chain at the next head; see ``Ring.walk``."""
        if self._taken == len(self._heads):
            return None
        head = self._heads[self._taken]
        # One at a time: chains that are not taken stay available.
        self._taken += 1
        self._next_avail = (self._next_avail + 1) & 0xFFFF
        return make_chain(head, self._descriptors(head))

    def plain(self, work_limit: int) -> tuple[list[PlainChain], int, bool]:
        """The plain chains that come next; see ``Ring.plain``.

        They are in an indirect table that is near, or three in a row in the descriptor table.
        """
        chains: list[PlainChain] = []
        table, near, near_gpa = self._table, self.near, self.near_gpa
        for head in self._heads[self._taken :]:
            offset = head * DESCRIPTOR_SIZE
            gpa, length, link = _unpack_linked(table, offset)
            place: memoryview | None = None
            if link & FLAGS_MASK != INDIRECT:
                if offset > self._last_direct:
                    break
                place, first = table, head << _NEXT_SHIFT
            elif length == PLAIN_SIZE:
                offset = gpa - near_gpa
                if not 0 <= offset <= self._last_short:
                    break
                place, first = near, 0
            if place is not None:
                (
                    header, header_length, header_link, data, length, data_link,
                    status, status_length, status_link,
                ) = _unpack_three(place, offset)
                if (
                    header_length != PLAIN_HEADER_BYTES
                    or header_link - first != _HEADER_LINK
                    or not 0 < length <= PLAIN_MAX_BYTES
                    or (data_link & _NOT_WRITE) - first != _DATA_LINK
                    or status_length != PLAIN_STATUS_BYTES
                    or status_link & FLAGS_MASK != WRITE
                ):
                    break
                chains.append((head, header, data, length, data_link & WRITE, status, ()))
            else:
                chain = self._indirect.plain(head, gpa, length)
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

    def push(self, chain: Chain, written: int) -> None:
        """Put ``chain`` into the used ring with ``written`` bytes; see ``Ring.push``."""
        used = self._next_used
        self._used_ring[used & self._mask] = chain.head | written << 32
        self._next_used = (used + 1) & 0xFFFF

    def push_all(self, done: list[int]) -> None:
        """Put all of them into the used ring; see ``Ring.push_all``."""
        used, mask, ring = self._next_used, self._mask, self._used_ring
        for element in done:  # a token is a head, so this is the used element
            ring[used & mask] = element
            used += 1
        self._next_used = used & 0xFFFF

    def publish(self) -> bool:
        """Store used.idx, then ask whether to interrupt; see ``Ring.publish``."""
        new, old = self._next_used, self._published
        if new == old:
            return False
        # x86 keeps stores in order: the elements are visible before the index.
        self._used_header[_IDX] = self._published = new
        # The driver asks for interrupts, then looks at used.idx; here it is the other way about.
        # Without the fence both could miss the other's store, and the interrupt would be lost.
        with self._full_fence:
            pass
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
        with self._full_fence:
            pass
        return self._avail_header[_IDX] != self._next_avail

    def _waiting_heads(self) -> list[int]:
        """A copy of the available ring's new entries, checked; RingError if they cannot be."""
        available = self._avail_header[_IDX]
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
        """``(gpa, length, flags)`` of each descriptor of the chain, those of an indirect table
        in place of the one that refers to it.

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
