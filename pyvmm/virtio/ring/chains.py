"""Descriptors made into chains: the code that split and packed rings share."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pyvmm.errors import GuestMemoryError, RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.ring.queue import Buffer, Chain, Queue
from pyvmm.virtio.spec import MAX_QUEUE_SIZE, DescriptorFlag

DESCRIPTOR_SIZE = 16
"""Bytes of a descriptor, split or packed: both are le64, le32, le16, le16.

Native formats are twice as fast as "<" ones, and the same bytes on the hosts there are.
"""
DESCRIPTOR = struct.Struct("@QIHH")

# Plain integers: an IntFlag operation costs more than the rest of a chain walk.
NEXT = int(DescriptorFlag.NEXT)
WRITE = int(DescriptorFlag.WRITE)
INDIRECT = int(DescriptorFlag.INDIRECT)


def check_size(queue: Queue) -> int:
    """Return the queue's size in entries; RingError unless the device allows it."""
    if not 0 < queue.size <= min(queue.max_size, MAX_QUEUE_SIZE):
        raise RingError(f"queue size {queue.size} is not within 1 to {queue.max_size}")
    return queue.size


def ring_area(
    memory: GuestMemory, name: str, gpa: int | None, length: int, alignment: int
) -> memoryview:
    """Return a view of one part of the virtqueue; RingError unless set, aligned, all in RAM."""
    if gpa is None:
        raise RingError(f"the {name} has no address")
    if gpa % alignment:
        raise RingError(f"the {name} at {gpa:#x} is not aligned to {alignment} bytes")
    try:
        return memory.view(gpa, length)
    except GuestMemoryError as error:
        raise RingError(f"the {name}: {error}") from error


def make_chain(
    head: int, descriptors: Iterable[tuple[int, int, int]], slots: int = 1
) -> Chain:
    """Return the chain of ``(gpa, length, flags)`` descriptors, without the empty ones.

    RingError if a readable one comes after a writable one.
    """
    readable: list[Buffer] = []
    writable: list[Buffer] = []
    written_to = False
    empty = 0
    for gpa, length, flags in descriptors:
        if flags & WRITE:
            written_to = True
            if length:
                writable.append((gpa, length))
            else:
                empty += 1
        elif written_to:
            # 2.7.4.2 "Driver Requirements: Message Framing"
            raise RingError("device-readable descriptor after a device-writable one")
        elif length:
            readable.append((gpa, length))
        else:
            empty += 1
    return Chain(head, readable, writable, slots, empty)


class IndirectTables:
    """Finds indirect descriptor tables; ``allowed`` if INDIRECT_DESC was negotiated.

    A table may be longer than the ring: a chain may have ``longest`` descriptors in all, as many
    as the largest ring that the device allows.  Linux makes tables of SEG_MAX + 2 descriptors
    whatever the ring's size, and reads SEG_MAX before the ring has one.
    """

    __slots__ = ("_allowed", "_memory", "longest")

    def __init__(self, memory: GuestMemory, *, allowed: bool, longest: int) -> None:
        self._memory = memory
        self._allowed = allowed
        self.longest = longest

    def at(self, gpa: int, length: int) -> memoryview:
        """Return the table of ``length`` bytes at ``gpa``; RingError if there can be none."""
        if not self._allowed:
            raise RingError("indirect descriptor, but INDIRECT_DESC was not negotiated")
        if not length or length % DESCRIPTOR_SIZE:
            raise RingError(f"indirect table of {length} bytes")
        try:
            return self._memory.view(gpa, length)
        except GuestMemoryError as error:
            raise RingError(f"indirect table: {error}") from error

    def too_long(self) -> RingError:
        """Return the error of a chain with a table and more than ``longest`` descriptors."""
        return RingError(
            f"descriptor chain is longer than {self.longest}, the most entries of a queue"
        )
