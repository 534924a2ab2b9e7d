"""Which kind of ring a queue is."""

from __future__ import annotations

from pyvmm.memory import GuestMemory
from pyvmm.virtio.packed import PackedRing
from pyvmm.virtio.queue import Queue, Ring
from pyvmm.virtio.spec import Feature
from pyvmm.virtio.split import SplitRing

_FIRST_PACKED_BASE = 0x8000_8000


def first_base(features: int) -> int:
    """``Queue.base`` of a ring nobody has used: both wrap counters of a packed one begin as 1
    (2.8.1 "Driver and Device Ring Wrap Counters")."""
    return _FIRST_PACKED_BASE if features & Feature.RING_PACKED else 0


def make_ring(queue: Queue, memory: GuestMemory, features: int) -> Ring:
    """The ring that ``features`` (as negotiated) make of ``queue``; RingError if malformed.

    Nothing is written into guest memory yet.
    """
    kind = PackedRing if features & Feature.RING_PACKED else SplitRing
    return kind(
        queue,
        memory,
        indirect=bool(features & Feature.INDIRECT_DESC),
        event_idx=bool(features & Feature.EVENT_IDX),
    )
