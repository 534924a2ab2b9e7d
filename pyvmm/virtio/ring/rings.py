"""Make the ring of a queue, split or packed, and check that no part of it lies in another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pyvmm.errors import RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.ring.packed import PackedRing, packed_lengths
from pyvmm.virtio.ring.queue import Queue, Ring
from pyvmm.virtio.ring.split import SplitRing, split_lengths
from pyvmm.virtio.spec import Feature

_FIRST_PACKED_BASE = 0x8000_8000
# The names of descriptor, driver and device area of each kind; True if the device writes there.
_SPLIT_AREAS = ("descriptor table", False), ("available ring", False), ("used ring", True)
_PACKED_AREAS = (
    ("descriptor ring", True),
    ("driver event suppression", False),
    ("device event suppression", True),
)

_Area = tuple[int, int, str, bool]
"""Begin and end in guest memory, the name, and True if the device writes there."""


def first_base(features: int) -> int:
    """Return ``Queue.base`` of a ring nobody has used.

    Both wrap counters of a packed ring begin as 1 (2.8.1 "Driver and Device Ring Wrap
    Counters")."""
    return _FIRST_PACKED_BASE if features & Feature.RING_PACKED else 0


def make_ring(
    queue: Queue, memory: GuestMemory, features: int, other_queues: Iterable[Queue] = ()
) -> Ring:
    """Return the ring that ``features`` (as negotiated) make of ``queue``; RingError if malformed.

    ``other_queues`` are the device's queues; no part of the ring may lie in one that is ready.
    Nothing is written into guest memory yet.
    """
    kind = PackedRing if features & Feature.RING_PACKED else SplitRing
    ring = kind(
        queue,
        memory,
        indirect=bool(features & Feature.INDIRECT_DESC),
        event_idx=bool(features & Feature.EVENT_IDX),
    )
    check_apart(queue, features, other_queues)
    return ring


def check_apart(queue: Queue, features: int, other_queues: Iterable[Queue]) -> None:
    """RingError if parts of ``queue`` overlap, or if one of them and one of another queue that is
    ready do, and the device writes into either.

    Parts may touch: Linux packs the available ring right behind the descriptor table.
    """
    mine = list(_areas(queue, features))
    for index, (start, end, name, _) in enumerate(mine):
        for its_start, its_end, its_name, _ in mine[:index]:
            if start < its_end and its_start < end:
                raise RingError(f"the {name} at {start:#x} overlaps the {its_name}")
    for other in other_queues:
        if other is queue or not other.ready:
            continue
        for its_start, its_end, its_name, its_written in _areas(other, features):
            for start, end, name, written in mine:
                if start < its_end and its_start < end and (written or its_written):
                    raise RingError(
                        f"the {name} at {start:#x} overlaps the {its_name} of another queue"
                    )


def _areas(queue: Queue, features: int) -> Iterator[_Area]:
    """Yield the parts of ``queue``, whose addresses are known to be set."""
    if features & Feature.RING_PACKED:
        lengths, kinds = packed_lengths(queue.size), _PACKED_AREAS
    else:
        event_idx = bool(features & Feature.EVENT_IDX)
        lengths, kinds = split_lengths(queue.size, event_idx=event_idx), _SPLIT_AREAS
    starts = queue.descriptor_area, queue.driver_area, queue.device_area
    for start, length, (name, written) in zip(starts, lengths, kinds, strict=True):
        if start is not None:
            yield start, start + length, name, written
