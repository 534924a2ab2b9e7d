"""Property test: block requests in any framing, in both kinds of ring, against a model of the
disk and of the queue.

After every batch: each head came back once, in order, with the exact length; the answers, the
data and the disk are what the model says; RAM changed only where it may; what had to be stable is;
the device interrupted exactly when it was asked to, and asks to be notified.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.model_disk import ModelDisk
from tests.support.packed_driver import PackedDriver
from tests.support.random_rings import forbidden_changes, permit
from tests.support.rig import DISK_SECTORS, Rig, make_rig
from tests.support.virtio_driver import (
    STATUS_POISON,
    BlockDriver,
    Descriptor,
    readable,
    writable,
)

SIZE = 16
RAM_BYTES = 1 << 16
SERIAL = "model"
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2


class Ask(NamedTuple):
    """A request: ``length`` bytes of data (or a segment of ``length`` sectors) at ``sector``.

    ``cuts`` are where its two byte streams are cut into descriptors, in 1/1000 of their length.
    """

    type: int
    sector: int
    length: int
    fill: int
    cuts: tuple[list[int], list[int]]
    indirect: bool


class Batch(NamedTuple):
    """Requests offered together, and after how many of them the driver wants an interrupt."""

    asks: list[Ask]
    interrupt_after: int


class Expected(NamedTuple):
    """What the model says: the status and the bytes of data written to the driver."""

    status: int
    data: bytes


class Model:
    """The disk as the specification describes it (5.2.6 "Device Operation")."""

    def __init__(self, content: bytes, features: int) -> None:
        self.now = bytearray(content)
        self.stable = bytearray(content)
        self.features = features

    @property
    def write_through(self) -> bool:
        return not self.features & BlockFeature.FLUSH

    def execute(self, ask: Ask) -> Expected:
        """Do ``ask`` to the model."""
        if ask.type == IN or ask.type == OUT:
            return self._transfer(ask)
        if ask.type == GET_ID:
            data = SERIAL.encode().ljust(20, b"\0")[: ask.length]
            return Expected(OK, data)
        if ask.type == FLUSH and not self.write_through:
            self.stable[:] = self.now
            return Expected(OK, b"")
        if ask.type == DISCARD and self.features & BlockFeature.DISCARD:
            return self._segment(ask, b"\xdd")
        if ask.type == WRITE_ZEROES and self.features & BlockFeature.WRITE_ZEROES:
            return self._segment(ask, b"\0")
        return Expected(UNSUPP, b"")

    def _transfer(self, ask: Ask) -> Expected:
        first, end = ask.sector * 512, ask.sector * 512 + ask.length
        if not ask.length or ask.length % 512 or end > len(self.now):
            return Expected(IOERR, b"")
        if ask.type == IN:
            return Expected(OK, bytes(self.now[first:end]))
        self._store(first, data_of(ask))
        return Expected(OK, b"")

    def _segment(self, ask: Ask, byte: bytes) -> Expected:
        if (ask.sector + ask.length) * 512 > len(self.now):
            return Expected(IOERR, b"")
        self._store(ask.sector * 512, byte * ask.length * 512)
        return Expected(OK, b"")

    def _store(self, first: int, data: bytes) -> None:
        self.now[first : first + len(data)] = data
        if self.write_through:
            self.stable[first : first + len(data)] = data


def data_of(ask: Ask) -> bytes:
    """What the driver sends behind the header."""
    if ask.type == OUT:
        return bytes((ask.fill + i // 100) & 0xFF for i in range(ask.length))
    if ask.type in (DISCARD, WRITE_ZEROES):
        return struct.pack("<QII", ask.sector, ask.length, 0)
    return b""


def room_of(ask: Ask) -> int:
    """How much room there is in front of the status byte."""
    return ask.length if ask.type in (IN, GET_ID) else 0


class Placed(NamedTuple):
    """A request in RAM."""

    head: int
    ask: Ask
    answer: int
    room: int


def cut(driver: BlockDriver, gpa: int, length: int, cuts: list[int]) -> list[tuple[int, int]]:
    """``length`` bytes at ``gpa`` in pieces; some may be empty."""
    ends = [0, *sorted(length * c // 1000 for c in cuts), length]
    return [(gpa + first, end - first) for first, end in pairwise(ends)]


def place(driver: BlockDriver, head: int, ask: Ask) -> Placed:
    """Write ``ask`` into RAM and offer it."""
    sent = struct.pack("<IIQ", ask.type, 0, ask.sector) + data_of(ask)
    room = room_of(ask)
    answer = driver.put(bytes([STATUS_POISON]) * (room + 1))
    chain: list[Descriptor] = []
    chain += [readable(*p) for p in cut(driver, driver.put(sent), len(sent), ask.cuts[0])]
    chain += [writable(*p) for p in cut(driver, answer, room + 1, ask.cuts[1])]
    driver.place([driver.indirect(chain)] if ask.indirect else chain, head)
    return Placed(head, ask, answer, room)


sectors = st.one_of(
    st.integers(0, DISK_SECTORS - 1),
    st.sampled_from([DISK_SECTORS - 1, DISK_SECTORS, 2**55, 2**64 - 1]),
)
cut_points = st.lists(st.integers(0, 1000), max_size=3)


def ask_of(types: list[int], lengths: list[int]) -> st.SearchStrategy[Ask]:
    """Requests of ``types`` with one of ``lengths``."""
    return st.builds(
        Ask,
        st.sampled_from(types),
        sectors,
        st.sampled_from(lengths),
        st.integers(0, 255),
        st.tuples(cut_points, cut_points),
        st.booleans(),
    )


asks = st.one_of(
    ask_of([IN, OUT], [512, 512, 1024, 1536]),
    ask_of([IN, OUT], [0, 1, 511, 513, 1025]),
    ask_of([FLUSH, FLUSH, 77], [0]),
    ask_of([GET_ID], [20, 20, 1, 19, 21, 64]),
    ask_of([DISCARD, WRITE_ZEROES], [1, 2, 8]),
)
batches = st.builds(Batch, st.lists(asks, min_size=1, max_size=5), st.integers(1, 6))

BASE = int(Feature.VERSION_1 | Feature.INDIRECT_DESC)
device_features = st.sampled_from(
    [
        BASE | int(block) | int(order)
        for order in (Feature(0), Feature.IN_ORDER)
        for block in (
            BlockFeature.FLUSH,
            BlockFeature.FLUSH | BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES,
            BlockFeature.WRITE_ZEROES,
            BlockFeature(0),
        )
    ]
)


@pytest.fixture(scope="module")
def model_rig() -> Iterator[Rig]:
    """One device over a ModelDisk for all examples; each begins with a reset."""
    content = b"".join(bytes([i]) * 512 for i in range(DISK_SECTORS))
    rig = make_rig(
        Path("/dev/null"),
        config=BlockConfig(queue_size=SIZE, serial=SERIAL),
        backend=ModelDisk(content),
        ram_bytes=RAM_BYTES,
    )
    yield rig
    rig.transport.close()


@settings(max_examples=150, deadline=None)
@given(
    features=device_features,
    packed=st.booleans(),
    event_idx=st.booleans(),
    script=st.lists(batches, min_size=1, max_size=5),
)
def test_requests_against_the_model(
    model_rig: Rig, features: int, packed: bool, event_idx: bool, script: list[Batch]
) -> None:
    rig, disk = model_rig, model_rig.backend
    assert isinstance(disk, ModelDisk)
    driver = rig.driver
    if packed:
        driver = PackedDriver(rig.transport, rig.memory, size=SIZE)
        features |= Feature.RING_PACKED
    driver.start(features | (Feature.EVENT_IDX if event_idx else 0))
    disk.stable[:] = disk.now
    model = Model(bytes(disk.now), features)
    arena = driver._top
    for batch in script:
        driver._top = arena
        assert not driver.is_quiet()
        placed: list[Placed] = []
        slots = SIZE
        for ask in batch.asks:
            slots -= 1 if ask.indirect else len(ask.cuts[0]) + len(ask.cuts[1]) + 2
            if slots >= 0:
                head = slots if not packed else 1000 + len(placed)
                placed.append(place(driver, head, ask))
        if event_idx:
            driver.interrupt_after(batch.interrupt_after)
        else:
            driver.want_interrupts(batch.interrupt_after > 1)
        interrupts = len(rig.irqs)
        mask = bytearray(RAM_BYTES)
        for request in placed:
            permit(mask, request.answer, request.room + 1)
        permit(mask, driver.desc, 16 * SIZE if packed else 0)
        permit(mask, driver.used, 4 if packed else 6 + 8 * SIZE)
        before = bytes(rig.ram)
        driver.notify()

        assert forbidden_changes(before, bytes(rig.ram), mask) == []
        expected = [model.execute(request.ask) for request in placed]
        used = driver.reap()
        assert [u.head for u in used] == [request.head for request in placed]
        for request, answer, done in zip(placed, expected, used, strict=True):
            room = driver.memory.read(request.answer, request.room + 1)
            assert room[-1] == answer.status
            assert done.length == len(answer.data) + 1
            assert room[: len(answer.data)] == answer.data
        assert disk.now == model.now
        assert disk.stable == model.stable
        if not packed or not event_idx:
            wanted = batch.interrupt_after
            asked_for = wanted <= len(placed) if event_idx else wanted > 1
            assert len(rig.irqs) - interrupts == asked_for
    assert rig.reports == []
    assert not driver.needs_reset
