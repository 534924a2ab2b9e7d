"""Property tests: the fast path and the general path are the same device.

Two devices, one of them without the fast path, get the same rings, honest and damaged, and must
leave behind the same RAM (used rings, statuses, data), the same disk, the same interrupts, the
same reports and the same wish to be called again.

Left out is what no driver may do and neither path promises anything about: requests offered at
once of which one has the other's header, status or descriptors for its data.
"""

from __future__ import annotations

import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyvmm.memory import GuestMemory
from pyvmm.virtio.block.device import BlockDevice
from pyvmm.virtio.ring.queue import DESCRIPTOR_WORK, Chain
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.general_path import GeneralBlockDevice
from tests.support.packed_driver import PackedDriver
from tests.support.random_rings import (
    DATA,
    RAM_BYTES,
    RAM_END,
    SIZE,
    STATUSES,
    TABLE_BYTES,
    TABLES,
    Ask,
    Round,
    asks,
    damages,
    lay_out,
    place_round,
)
from tests.support.rig import DISK_SECTORS, Rig, make_rig
from tests.support.scratched_disk import ScratchedDisk
from tests.support.virtio_driver import INDIRECT, RAM_BASE, BlockDriver

BASE = int(Feature.VERSION_1 | Feature.INDIRECT_DESC)
FLUSH = BlockFeature.FLUSH
ring_features = st.sampled_from(
    [
        BASE | int(feature)
        for feature in (
            FLUSH,
            FLUSH | BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES,
            BlockFeature(0),  # every write is durable
        )
    ]
    + [int(Feature.VERSION_1 | FLUSH)]
)


class Twist(NamedTuple):
    """One field of a descriptor is something else: in the chain of request ``ask``, that of its
    "header", first "data" or "status", or the "table" that they are in, if they are in one.
    ``field`` counts as in struct virtq_desc; flags are flipped."""

    ask: int
    part: str
    field: int
    value: int


class Offer(NamedTuple):
    """A round and what is wrong with it, and after how many used chains the driver wants an
    interrupt."""

    round: Round
    twists: list[Twist]
    interrupt_after: int


def plain_ask(write: bool, sector: int, pieces: list[int], indirect: bool) -> Ask:
    """A read or write as drivers make them."""
    return Ask(int(write), sector, pieces, not write, indirect)


def with_neighbours(some: list[tuple[Ask, str]]) -> list[Ask]:
    """The requests; some go on where the one before them ends on the disk."""
    result: list[Ask] = []
    for ask, relation in some:
        if result and relation != "none":
            before = result[-1]
            sector = before.sector + sum(before.pieces) // 512
            ask = ask._replace(sector=sector % 2**64)
            if relation == "same":
                ask = ask._replace(type=before.type, device_writes=before.device_writes)
        result.append(ask)
    return result


plain_asks = st.builds(
    plain_ask,
    st.booleans(),
    st.integers(0, DISK_SECTORS),
    st.sampled_from([[512], [512], [1024], [4096], [512, 512], [1024, 512, 512]]),
    st.sampled_from([True, True, True, False]),
)
some_asks = st.lists(
    st.tuples(
        st.one_of(plain_asks, plain_asks, plain_asks, asks),
        st.sampled_from(["none", "same", "same", "next"]),
    ),
    min_size=1,
    max_size=SIZE,
).map(with_neighbours)
flush_asks = st.builds(Ask, st.just(4), st.just(0), st.just([]), st.booleans(), st.just(True))
lone_asks = st.one_of(plain_asks, plain_asks, flush_asks, asks).map(lambda ask: [ask])
odd_gpas = [
    *(0, RAM_BASE - 1, RAM_BASE - 16, RAM_BASE - 48, RAM_BASE - 512, RAM_BASE - 4096),
    *(RAM_END - 1, RAM_END - 8, RAM_END - 256, RAM_END, 2**63, 2**64 - 512, 2**64 - 1),
]
odd_values = {
    0: odd_gpas,
    1: [0, 1, 2, 15, 16, 17, 32, 48, 50, 64, 511, 513, 1024, 2**31, 2**32 - 1],
    2: [1, 2, 3, 4, 5, 6, 8, 0x80, 0x8000],  # flags
    3: [0, 1, 2, 3, 4, SIZE, 0xFFFF],  # next, or the buffer ID
}
parts = ["header", "data", "status", "table"]
twists = st.one_of(
    [
        st.builds(
            Twist,
            st.integers(0, SIZE),
            st.sampled_from(parts),
            st.just(field),
            st.sampled_from(values),
        )
        for field, values in odd_values.items()
    ]
)


def mostly_none(some: st.SearchStrategy[list[Any]]) -> st.SearchStrategy[list[Any]]:
    """An empty list two times of three."""
    return st.one_of(st.just([]), st.just([]), some)


def offers_of(some: st.SearchStrategy[list[Ask]]) -> st.SearchStrategy[Offer]:
    """Offers of ``some`` requests, and what is wrong with them."""
    return st.builds(
        Offer,
        st.builds(
            Round,
            some,
            mostly_none(st.lists(damages, max_size=2)),
            mostly_none(st.lists(st.integers(0, SIZE), max_size=3)),
        ),
        st.lists(twists, max_size=3),
        st.integers(1, SIZE),
    )


class Recorded(GeneralBlockDevice):
    """Remembers whether a chain was served of which the order of service can be seen."""

    entangled = False

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        if chain.readable and DATA - 16 < chain.readable[0][0] < RAM_END:
            self.entangled = True  # the header may be another's data
        for gpa, length in chain.writable[:-1]:
            if gpa < DATA and gpa + length > RAM_BASE:
                self.entangled = True  # data goes where headers and tables are
        if chain.writable:
            gpa, length = chain.writable[-1]
            last = gpa + length - 1
            if RAM_BASE <= last < RAM_END and (
                length > 1 or not STATUSES <= last < STATUSES + SIZE
            ):
                self.entangled = True
        return super()._serve(chain, memory)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Rig, Rig]]:
    """A device with the fast path and one without; each example begins with a reset.  A pass of
    theirs is over after some four requests."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for room in ("device", "block.fast.path"):
            patch.setattr(f"pyvmm.virtio.{room}.PASS_BYTES", 14 * DESCRIPTOR_WORK)
        rigs = []
        for kind in (BlockDevice, Recorded):
            image = Path(folder) / kind.__name__
            image.write_bytes(bytes(DISK_SECTORS * 512))
            backend = ScratchedDisk(image, frozenset({20, 41}))
            rigs.append(
                make_rig(
                    image, backend=backend, queue_size=SIZE, ram_bytes=RAM_BYTES, device_type=kind
                )
            )
        yield rigs[0], rigs[1]
        for rig in rigs:
            rig.transport.close()
            rig.backend.close()


def start(rig: Rig, features: int, packed: bool) -> BlockDriver:
    """A running driver of a device that remembers nothing of the last example."""
    noise = random.Random(7).randbytes(RAM_BYTES)
    rig.ram[:] = noise
    rig.path.write_bytes(noise[: DISK_SECTORS * 512])
    rig.irqs.clear()
    rig.reports.clear()
    durable_writes(rig).clear()
    driver = BlockDriver(rig.transport, rig.memory, size=SIZE)
    if packed:
        driver = PackedDriver(rig.transport, rig.memory, size=SIZE)
        features |= Feature.RING_PACKED
    driver.start(features)
    return driver


def apply(twist: Twist, driver: BlockDriver, asks: list[Ask], first: int, indirect: bool) -> None:
    """Change the descriptor in RAM; ``first`` is where in the ring the first request was put."""
    index = twist.ask % len(asks)
    in_tables = [indirect and ask.indirect for ask in asks]
    pieces = [len(ask.pieces) for ask in asks]
    entry = {"header": 0, "data": 1, "status": pieces[index] + 1, "table": 0}[twist.part]
    if in_tables[index] and twist.part != "table":
        gpa = TABLES + TABLE_BYTES * index + 16 * entry
    else:
        before = sum(1 if t else n + 2 for t, n in zip(in_tables[:index], pieces, strict=False))
        gpa = driver.desc + 16 * ((first + before + entry) % SIZE)
    fields = list(struct.unpack("<QIHH", driver.memory.read(gpa, 16)))
    packed = isinstance(driver, PackedDriver)
    if packed:  # their flags are the last field
        fields[2:] = fields[:1:-1]
    fields[twist.field] = twist.value ^ (fields[2] if twist.field == 2 else 0)
    if packed:
        fields[2:] = fields[:1:-1]
    driver.memory.write(gpa, struct.pack("<QIHH", *fields))


def serve(rig: Rig, driver: BlockDriver, offer: Offer, indirect: bool) -> list[float | None]:
    """Offer the round and serve it; what the device answered to each call."""
    first, heads = 0, []
    if isinstance(driver, PackedDriver):
        first = driver.slot
        place_round(driver, offer.round, indirect)
    else:
        heads = lay_out(driver, offer.round, indirect)[1]
    for twist in offer.twists:
        apply(twist, driver, offer.round.asks, first, indirect)
    if heads:
        driver.offer(*heads)
    if driver.event_idx:
        driver.interrupt_after(offer.interrupt_after)
    else:
        driver.want_interrupts(offer.interrupt_after % 2 == 0)
    answers: list[float | None] = []
    while len(answers) < SIZE and (not answers or answers[-1] is not None):
        answers.append(rig.transport.service(0))
    return answers


def tables_elsewhere(driver: BlockDriver) -> bool:
    """Whether a descriptor refers to a table in what may be another request's data."""
    packed = isinstance(driver, PackedDriver)
    ring = driver.memory.read(driver.desc, 16 * SIZE)
    return any(
        d[3 if packed else 2] & INDIRECT and d[0] + d[1] > DATA and d[0] < RAM_END
        for d in struct.iter_unpack("<QIHH", ring)
    )


def durable_writes(rig: Rig) -> dict[int, bool]:
    """By sector, whether what is there was stable once it was answered."""
    assert isinstance(rig.backend, ScratchedDisk)
    return rig.backend.writes


def assert_equal(
    pair: tuple[Rig, Rig], drivers: list[BlockDriver], offer: Offer, may: bool
) -> bool:
    """Both serve the offer and do the same; False if there is no telling.  ``may`` is whether
    the driver uses indirect tables."""
    fast, general = pair
    assert isinstance(general.device, Recorded)
    general.device.entangled = False
    answers = [serve(rig, driver, offer, may) for rig, driver in zip(pair, drivers, strict=True)]
    if general.device.entangled or tables_elsewhere(drivers[1]):
        return False
    assert answers[0] == answers[1]
    assert fast.ram == general.ram
    assert fast.disk == general.disk
    assert durable_writes(fast) == durable_writes(general)
    assert fast.irqs == general.irqs
    assert fast.reports == general.reports
    assert drivers[0].status == drivers[1].status
    return True


@settings(max_examples=300, deadline=None)
@given(
    features=ring_features,
    packed=st.booleans(),
    event_idx=st.booleans(),
    unasked=st.booleans(),
    script=st.one_of(
        st.lists(offers_of(some_asks), min_size=1, max_size=4),
        # One at a time, and more than once round the ring.
        st.lists(offers_of(lone_asks), min_size=1, max_size=SIZE + 4),
    ),
)
def test_both_paths_do_the_same(
    pair: tuple[Rig, Rig],
    features: int,
    packed: bool,
    event_idx: bool,
    unasked: bool,
    script: list[Offer],
) -> None:
    # ``unasked``: the driver uses indirect tables whether it has negotiated them or not.
    may = unasked or bool(features & Feature.INDIRECT_DESC)
    features |= Feature.EVENT_IDX if event_idx else 0
    drivers = [start(rig, features, packed) for rig in pair]
    for offer in script:
        assume(assert_equal(pair, drivers, offer, may))
        if drivers[0].needs_reset:
            break


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("request_type", "pieces"),
    [(0, [512]), (1, [512]), (0, [512, 1024]), (1, [512, 1024]), (4, [])],
)
def test_every_single_oddity_is_seen_by_both(
    pair: tuple[Rig, Rig],
    packed: bool,
    indirect: bool,
    alone: bool,
    request_type: int,
    pieces: list[int],
) -> None:
    asks = [
        Ask(request_type, 8 * i, pieces, request_type == 0, indirect)
        for i in range(1 if alone else 3)
    ]
    for field, values in odd_values.items():
        for part in parts:
            for value in values:
                offer = Offer(Round(asks, [], []), [Twist(1, part, field, value)], 1)
                drivers = [start(rig, BASE | int(FLUSH), packed) for rig in pair]
                assert_equal(pair, drivers, offer, True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("flushes", [{0}, {1}, {0, 1}, {0, 3}, {2}, set()])
def test_fault_7_a_pass_ends_at_the_same_chain(
    pair: tuple[Rig, Rig], packed: bool, indirect: bool, sequential: bool, flushes: set[int]
) -> None:
    """A flush is more work than its descriptors show; here it has data, as a read or a write.
    What is taken along with it may be too much then, in the middle of one transfer."""
    asks = [
        Ask(4, 0, [512], False, indirect) if n in flushes
        else Ask(1, n if sequential else 3 * n, [512], False, indirect)
        for n in range(5)
    ]  # fmt: skip
    drivers = [start(rig, BASE | int(FLUSH), packed) for rig in pair]
    for _ in range(2):
        assert assert_equal(pair, drivers, Offer(Round(asks, [], []), [], 1), indirect)
