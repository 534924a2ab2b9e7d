"""The fast ring of a queue, split or packed."""

from __future__ import annotations

from collections.abc import Iterable

from pyvmm.memory import GuestMemory
from pyvmm.virtio.block.fast.packed import FastPackedRing
from pyvmm.virtio.block.fast.ring import FastRing
from pyvmm.virtio.block.fast.split import FastSplitRing
from pyvmm.virtio.ring.queue import Queue
from pyvmm.virtio.ring.rings import check_apart
from pyvmm.virtio.spec import Feature


def make_fast_ring(
    queue: Queue, memory: GuestMemory, features: int, other_queues: Iterable[Queue] = ()
) -> FastRing:
    """Return what ``rings.make_ring`` does, with the methods of a ``FastRing``; RingError."""
    kind = FastPackedRing if features & Feature.RING_PACKED else FastSplitRing
    ring = kind(
        queue,
        memory,
        indirect=bool(features & Feature.INDIRECT_DESC),
        event_idx=bool(features & Feature.EVENT_IDX),
    )
    check_apart(queue, features, other_queues)
    return ring
