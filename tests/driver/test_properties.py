"""Property tests of the driver half: whatever is asked, our device in process and a model of the
disk agree; whatever a device does, every context comes back once."""

from __future__ import annotations

import errno
import itertools
import struct
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.driver import (
    Completion,
    DeviceBrokenError,
    QueueFullError,
    RequestError,
    TransportError,
    VirtioBlkQueue,
)
from tests.support.driver_rigs import (
    DISK_SECTORS,
    RING_KINDS,
    DiskRig,
    FakeRig,
    RingKind,
    pattern,
)

METHODS = ["read", "readv", "read_raw", "write", "writev", "write_raw"]
METHODS += ["discard", "write_zeroes", "flush", "get_id"]
QUEUE_SIZE = 16
AREA = 8 * 512
"""Bytes of shared memory for the data of a request; each has its own."""


class Ask(NamedTuple):
    """A request.  A transfer's data are cut at ``cuts`` (bytes from its start)."""

    method: str
    sector: int
    sectors: int
    cuts: list[int]
    unmap: bool
    fill: int


class Batch(NamedTuple):
    """What is queued, by queue, before the device is notified."""

    asks: list[tuple[int, Ask]]
    interrupts: bool


asks = st.builds(
    Ask,
    st.sampled_from(METHODS),
    st.one_of(st.integers(0, DISK_SECTORS - 8), st.integers(-1, DISK_SECTORS)),
    st.integers(0, 8),
    st.lists(st.integers(0, 8 * 512), max_size=4).map(sorted),
    st.booleans(),
    st.integers(0, 255),
)
batches = st.lists(
    st.builds(Batch, st.lists(st.tuples(st.integers(0, 7), asks), max_size=24), st.booleans()),
    max_size=6,
)


class Model:
    """What the disk and the shared memory hold."""

    def __init__(self, rig: DiskRig) -> None:
        self.disk = bytearray(b"".join(pattern(i) for i in range(DISK_SECTORS)))
        self.data = bytearray(rig.data.length)

    def apply(self, ask: Ask, area: int) -> None:
        offset, length = 512 * ask.sector, 512 * ask.sectors
        if ask.method.startswith("read"):
            self.data[area : area + length] = self.disk[offset : offset + length]
        elif ask.method in ("discard", "write_zeroes"):
            self.disk[offset : offset + length] = bytes(length)  # what this backend discards to
        elif ask.method.startswith("write"):
            self.disk[offset : offset + length] = self.data[area : area + length]
        elif ask.method == "get_id":
            self.data[area : area + 20] = b"rig".ljust(20, b"\0")


def pieces_of(ask: Ask) -> list[slice]:
    """A transfer's data, cut."""
    length = 512 * ask.sectors
    edges = [0, *(min(cut, length) for cut in ask.cuts), length]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def descriptors_of(ask: Ask) -> int:
    """How many a direct chain has."""
    if ask.method == "flush":
        return 2
    if ask.method in ("readv", "writev"):
        return 2 + len([piece for piece in pieces_of(ask) if piece.start < piece.stop])
    return 3


def submit(rig: DiskRig, queue: VirtioBlkQueue, ask: Ask, area: int, context: object) -> None:
    """Queue ``ask``, whose data are at ``area``."""
    offset, length = 512 * ask.sector, 512 * ask.sectors
    view, address = rig.data.view[area : area + length], rig.data.address + area
    if ask.method.startswith("write"):
        view[:] = bytes([ask.fill]) * length
    method = getattr(queue, ask.method)
    if ask.method in ("readv", "writev"):
        method(offset, [view[piece] for piece in pieces_of(ask)], context)
    elif ask.method in ("read_raw", "write_raw"):
        method(offset, address, length, context)
    elif ask.method in ("read", "write"):
        method(offset, view, context)
    elif ask.method == "write_zeroes":
        method(offset, length, context, unmap=ask.unmap)
    elif ask.method == "discard":
        method(offset, length, context)
    elif ask.method == "get_id":
        method(rig.data.view[area : area + 20], context)
    else:
        method(context)


def is_possible(ask: Ask) -> bool:
    """Whether the driver lets it through."""
    if ask.method in ("flush", "get_id"):
        return True
    return ask.sectors > 0 and 0 <= ask.sector <= DISK_SECTORS - ask.sectors


@pytest.mark.parametrize("kind", RING_KINDS, ids=str)
@settings(max_examples=25, deadline=None)
@given(queues=st.integers(1, 8), steps=batches)
def test_a_disk_and_its_model_agree(kind: RingKind, queues: int, steps: list[Batch]) -> None:
    with DiskRig(kind, queues=queues, queue_size=QUEUE_SIZE) as rig:
        model, contexts = Model(rig), 0
        for batch in steps:
            for queue in rig.queues:
                queue.set_used_notif_enabled(batch.interrupts)
            accepted: list[list[tuple[int, Ask, int]]] = [[] for _ in range(queues)]
            free = [QUEUE_SIZE] * queues
            for number, (wanted, ask) in enumerate(batch.asks):
                contexts += 1
                index, area = wanted % queues, number * AREA
                needed = 1 if kind.indirect else descriptors_of(ask)
                try:
                    submit(rig, rig.queues[index], ask, area, contexts)
                except QueueFullError:
                    assert needed > free[index]
                except RequestError:
                    assert not is_possible(ask)
                else:
                    assert is_possible(ask)
                    free[index] -= needed
                    assert free[index] >= 0
                    accepted[index].append((contexts, ask, area))
            model.data[:] = rig.data.view
            for index, requests in enumerate(accepted):
                assert rig.queues[index].in_flight == len(requests)
                expected = [Completion(context, 0) for context, _, _ in requests]
                assert rig.finish(index) == expected
                for _, ask, area in requests:
                    model.apply(ask, area)
            assert rig.interrupted() == (batch.interrupts and any(accepted))
            assert rig.disk == model.disk
            assert rig.data.view == model.data


class Scribble(NamedTuple):
    """``data`` written by the device at ``offset`` of an area of its queue."""

    area: str
    offset: int
    data: bytes


class Use(NamedTuple):
    """A used element or descriptor for ``head``, where the next one belongs."""

    head: int


class Submit(NamedTuple):
    """Reads queued, as many as there is room for."""

    requests: int


wicked_steps = st.lists(
    st.one_of(
        st.builds(Submit, st.integers(1, 5)),
        st.builds(Use, st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF))),
        st.builds(
            Scribble,
            st.sampled_from(["descriptor", "driver", "device", "device"]),
            st.integers(0, 60),
            st.binary(min_size=1, max_size=16),
        ),
        st.just("collect"),
    ),
    max_size=30,
)


@pytest.mark.parametrize("kind", RING_KINDS, ids=str)
@settings(max_examples=50, deadline=None)
@given(steps=wicked_steps)
def test_a_wicked_device(kind: RingKind, steps: list[object]) -> None:
    """It can break the queue, but not the driver: no other exception, no context lost."""
    with FakeRig(kind) as rig:
        submitted, back, slot = 0, Counter[int](), 0
        try:
            for step in steps:
                if isinstance(step, Submit):
                    for _ in range(step.requests):
                        try:
                            rig.submit(submitted)
                            submitted += 1
                        except QueueFullError:
                            break
                    rig.queue.avail_notif_needed()
                elif isinstance(step, Use) and kind.packed:
                    lap, at = divmod(slot, rig.size)
                    rig.put_used_descriptor(at, step.head, wrap=1 - lap % 2)
                    slot += 1 if kind.indirect else 3
                elif isinstance(step, Use):
                    rig.put_used(step.head)
                elif isinstance(step, Scribble):
                    base: int = getattr(rig.layout, step.area)
                    rig.ram.write(base + step.offset, step.data)
                else:
                    for completion in rig.queue.completions():
                        assert completion.ret in (0, -errno.EIO, -errno.ENOTSUP, -errno.EPROTO)
                        back[completion.context] += 1
        except DeviceBrokenError:
            with pytest.raises(DeviceBrokenError, match=r"not in flight|requests in flight"):
                rig.queue.flush("late")
        back.update(rig.queue.abandon())
        assert back == Counter(range(submitted))


@settings(max_examples=30, deadline=None)
@given(config=st.binary(min_size=0, max_size=60))
def test_any_configuration_space(config: bytes) -> None:
    """Limits that make no sense are refused, or kept to."""
    try:
        rig = FakeRig(config=config or bytes(60))
    except TransportError:
        return
    with rig:
        capacity, size_max, seg_max = struct.unpack("<QII", config.ljust(60, b"\0")[:16])
        size_max = size_max or 1 << 32  # none
        try:
            rig.queue.read_raw(0, rig.data.address, 4096, 0)
        except RequestError:
            assert capacity < 8 or size_max * max(1, min(6, seg_max)) < 4096
        else:
            segments = rig.table_of(0)[1:-1]
            assert len(segments) <= max(1, seg_max)
            assert sum(length for _, length, _, _ in segments) == 4096
            assert all(length <= size_max for _, length, _, _ in segments)
