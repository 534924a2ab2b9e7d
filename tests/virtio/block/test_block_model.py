"""Property test: the block device against the model of tests/support/block_model.py.

A script of batches, cache mode changes, bad sectors, failing flushes and resets is played to both.
After each batch the answers must be the model's, every head must have come back once and in
order, all of RAM but what belongs to the ring must be exactly what the model predicts, and what
the backend holds on stable storage must be something the model allows.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.memory import GuestMemory
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BlockFeature, Feature, Register
from tests.support.block_model import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    OUT,
    SECTORS,
    SERIAL,
    UNMAP,
    WRITE_ZEROES,
    Ask,
    Damage,
    Model,
    Restart,
    Segment,
    SetWriteback,
    TwoDisks,
    pieces,
)
from tests.support.packed_driver import PackedDriver
from tests.support.virtio_driver import (
    RAM_BASE,
    STATUS_POISON,
    BlockDriver,
    Descriptor,
    readable,
    writable,
)

QUEUE_SIZE = 32
RAM_BYTES = 1 << 18  # enough for a whole script
WRITEBACK = Register.CONFIG + 32

Step = list[Ask] | SetWriteback | Restart | Damage

# Scripts


def payloads(sectors: int) -> st.SearchStrategy[bytes]:
    fill = st.lists(st.integers(1, 0xDC), min_size=sectors, max_size=sectors)
    return fill.map(lambda values: b"".join(bytes([v]) * 512 for v in values))


segments = st.builds(
    Segment,
    st.one_of(st.integers(0, SECTORS), st.integers(0, SECTORS), st.just(2**64 - 1)),
    st.one_of(st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 2**32 - 1])),
    st.sampled_from([0, 0, 0, UNMAP, UNMAP, 2, 1 << 31]),
)
good_segments = st.builds(
    Segment, st.integers(0, SECTORS - 3), st.integers(1, 3), st.sampled_from([0, 0, 0, UNMAP])
)
cuts = st.tuples(*2 * [st.lists(st.integers(0, 1600), max_size=2)])


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    kind = draw(
        st.sampled_from([IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77])
    )
    sector = draw(st.one_of(st.integers(0, SECTORS), st.integers(0, SECTORS), st.just(2**64 - 1)))
    payload, room, ranges = b"", 0, []
    if kind == OUT:
        payload = draw(st.integers(0, 3).flatmap(payloads))
    elif kind == IN:
        room = draw(st.sampled_from([0, 1, 512, 512, 1024, 1536]))
    elif kind == GET_ID:
        room = draw(st.sampled_from([0, 1, 20, 21, 64]))
    elif kind in (DISCARD, WRITE_ZEROES):
        some = st.lists(good_segments, min_size=1, max_size=3)
        ranges = draw(st.one_of(some, some, st.lists(segments, max_size=33)))
        payload = b"".join(s.pack() for s in ranges)
    if draw(st.integers(0, 9)) == 0:  # the wrong length, or direction
        payload, room = draw(st.sampled_from([(payload[:-1], room), (payload, room + 5)]))
        payload, room = draw(st.sampled_from([(payload, room), (b"x" * 7, room)]))
    return Ask(kind, sector, payload, room, ranges, draw(cuts), draw(st.booleans()))


batches = st.lists(asks(), min_size=1, max_size=5)
steps: st.SearchStrategy[Step] = st.one_of(
    batches,
    batches,
    batches,
    batches,
    st.builds(SetWriteback, st.sampled_from([0, 0, 1, 1, 2, 255])),
    st.builds(
        Restart,
        st.lists(
            st.sampled_from(
                [
                    BlockFeature.FLUSH,
                    BlockFeature.CONFIG_WCE,
                    BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES,
                    Feature.INDIRECT_DESC,
                    Feature.EVENT_IDX,
                ]
            ),
            max_size=3,
        ).map(lambda bits: sum(set(map(int, bits)))),
    ),
    st.builds(Damage, st.frozensets(st.integers(0, SECTORS - 1), max_size=2), st.booleans()),
)


# The driver's side


class Bench:
    """The device behind a transport, the model beside it, and a clock that the rate limit
    reads: waiting moves it."""

    def __init__(self, *, limited: bool, packed: bool) -> None:
        self.now_s = 0.0
        self.backend = TwoDisks()
        self.model = Model()
        self.ram = bytearray(RAM_BYTES)
        self.memory = GuestMemory.over(self.ram, RAM_BASE)
        limit = RateLimit(ops_per_s=100, ops_burst=3, bytes_per_s=10_000, bytes_burst=1000)
        self.device = BlockDevice(
            BlockConfig(
                serial=SERIAL.rstrip(b"\0").decode(),
                queue_size=QUEUE_SIZE,
                rate_limit=limit if limited else RateLimit(),
            ),
            self.backend,
            clock=lambda: self.now_s,
        )
        self.transport = MmioTransport(
            self.device, self.memory, lambda: None, report=lambda line: None
        )
        kind = PackedDriver if packed else BlockDriver
        self.driver = kind(self.transport, self.memory, size=QUEUE_SIZE)
        # IN_ORDER would oblige the driver too, to use its descriptors in order.
        self.never = int(Feature.IN_ORDER | (0 if packed else Feature.RING_PACKED))
        self.restart(0)
        driver = self.driver
        # What of RAM belongs to the device's side of the ring.
        self.ring_areas = [
            slice(gpa - RAM_BASE, gpa - RAM_BASE + length)
            for gpa, length in (
                [(driver.desc, 16 * QUEUE_SIZE), (driver.used, 4)]
                if packed
                else [(driver.used, 6 + 8 * QUEUE_SIZE)]
            )
        ]

    def restart(self, declined: int) -> None:
        features = self.device.avail_features & ~(declined | self.never)
        self.driver.start(features)
        self.model.restart(features)

    def play(self, step: Step) -> None:
        if isinstance(step, Restart):
            self.restart(step.declined)
        elif isinstance(step, SetWriteback):
            self.transport.write(WRITEBACK, 1, step.value)
            self.model.set_writeback(step.value)
            if self.model.features & BlockFeature.CONFIG_WCE:
                assert self.transport.read(WRITEBACK, 1) == self.model.writeback
        elif isinstance(step, Damage):
            # A disk that died stays dead: the flush error is latched.
            self.model.disk = Damage(step.bad, step.dying or self.model.disk.dying)
            self.backend.bad, self.backend.dying = self.model.disk
        else:
            self.ask(step)
        self.check_stable()

    def ask(self, batch: list[Ask]) -> None:
        """Lay the batch out, have it served, and compare everything."""
        heads: list[int] = []
        rooms: list[list[tuple[int, int]]] = []
        free = 0
        for ask in batch:
            chain, room = self.lay_out(ask)
            self.driver.place(chain, free)
            heads.append(free)
            rooms.append(room)
            free += len(chain)

        wanted = bytearray(self.ram)
        answers = [self.model.answer(ask) for ask in batch]
        for room, answer in zip(rooms, answers, strict=True):
            place = [gpa - RAM_BASE + i for gpa, length in room for i in range(length)]
            for where, byte in zip(place, answer.data, strict=False):
                wanted[where] = byte
            wanted[place[-1]] = answer.status

        delay_s = self.transport.service(0)
        while delay_s is not None:
            self.now_s += delay_s
            delay_s = self.transport.service(0)

        lengths = [answer.used_length for answer in answers]
        assert self.driver.reap() == list(zip(heads, lengths, strict=True))
        for area in self.ring_areas:
            wanted[area] = self.ram[area]
        assert differences(self.ram, wanted) == []
        assert differences(self.backend.volatile, b"".join(self.model.sectors)) == []

    def lay_out(self, ask: Ask) -> tuple[list[Descriptor], list[tuple[int, int]]]:
        """``ask`` in RAM, in pieces that do not touch: its chain, and the writable pieces."""
        request = struct.pack("<IIQ", ask.type, 0, ask.sector) + ask.payload
        room = bytes([STATUS_POISON]) * (ask.room + 1)
        chain: list[Descriptor] = []
        for piece in pieces(request, ask.cuts[0]):
            chain.append(readable(self.driver.put(piece), len(piece)))
            self.driver.alloc(3, 1)
        places = []
        for piece in pieces(room, ask.cuts[1]):
            places.append((self.driver.put(piece), len(piece)))
            self.driver.alloc(3, 1)
        chain += [writable(*place) for place in places]
        if ask.indirect and self.model.features & Feature.INDIRECT_DESC:
            chain = [self.driver.indirect(chain)]
        return chain, places

    def check_stable(self) -> None:
        for sector, allowed in enumerate(self.model.survivors):
            content = bytes(self.backend.stable[512 * sector : 512 * (sector + 1)])
            assert content in allowed, f"sector {sector} holds {content[:1]!r} after a power cut"


def differences(found: bytearray, wanted: bytes | bytearray) -> list[str]:
    """The first few bytes that are not as they should be; pytest's own takes minutes."""
    if found == wanted:
        return []
    pairs = enumerate(zip(found, wanted, strict=True))
    return [f"{i:#x}: {a:#x} for {b:#x}" for i, (a, b) in pairs if a != b][:8]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("limited", [False, True])
@settings(max_examples=200, deadline=None)
@given(script=st.lists(steps, min_size=1, max_size=8))
def test_device_answers_as_the_model_does(
    limited: bool, packed: bool, script: list[Step]
) -> None:
    bench = Bench(limited=limited, packed=packed)
    for step in script:
        bench.play(step)
    assert not bench.driver.needs_reset
    bench.transport.close()
