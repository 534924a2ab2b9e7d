"""Property test: whatever is in the rings, the transport survives it and touches only what the
driver gave it to write.

Rounds begin as honest requests in honest rings and are then damaged in a few places, because
rings of pure noise seldom get past their first descriptor.
"""

from __future__ import annotations

import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyvmm.virtio.spec import Feature, Register
from tests.support.rig import DISK_SECTORS, Rig, make_rig
from tests.support.virtio_driver import (
    INDIRECT,
    RAM_BASE,
    WRITE,
    Descriptor,
    linked,
    readable,
    writable,
)

SIZE = 16
RAM_BYTES = 1 << 16
RAM_END = RAM_BASE + RAM_BYTES
# The arena, behind the rings: request i has header, status and an indirect table at index i.
HEADERS = RAM_BASE + 0x1000
STATUSES = RAM_BASE + 0x1800
TABLES = RAM_BASE + 0x2000
TABLE_BYTES = 16 * 8
DATA = RAM_BASE + 0x4000


class Ask(NamedTuple):
    """A request; ``pieces`` are the lengths of its data buffers."""

    type: int
    sector: int
    pieces: list[int]
    device_writes: bool
    indirect: bool


class Damage(NamedTuple):
    """``descriptor`` in place of number ``entry`` of the descriptor table (``table`` < 0) or of
    an indirect one."""

    table: int
    entry: int
    descriptor: Descriptor


class Round(NamedTuple):
    """What the driver offers between two notifications."""

    asks: list[Ask]
    damages: list[Damage]
    extra_heads: list[int]


gpas = st.one_of(
    st.integers(0, 7).map(lambda i: HEADERS + 16 * i),
    st.integers(0, 7).map(lambda i: TABLES + TABLE_BYTES * i),
    st.integers(0, 64).map(lambda i: DATA + 256 * i),
    st.sampled_from([0, RAM_BASE - 1, RAM_END - 8, RAM_END, 2**63, 2**64 - 16, 2**64 - 1]),
)
lengths = st.one_of(
    st.sampled_from([0, 1, 8, 16, 32, 48, 128, 511, 512, 513, 1024, 4096]),
    st.integers(0, 2**32 - 1),
)
descriptors = st.builds(
    Descriptor,
    gpas,
    lengths,
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, SIZE - 1), st.integers(0, 0xFFFF)),
)
asks = st.builds(
    Ask,
    st.sampled_from([0, 0, 0, 1, 1, 4, 8, 11, 77]),
    st.one_of(st.integers(0, DISK_SECTORS), st.integers(0, 2**64 - 1)),
    st.one_of(
        st.sampled_from([[512], [512], [1024, 512], [1, 511], [200, 300, 12], []]),
        st.lists(st.sampled_from([0, 1, 20, 511, 512, 1024]), max_size=4),
    ),
    st.booleans(),
    st.booleans(),
)
damages = st.builds(Damage, st.integers(-4, 7), st.integers(0, SIZE - 1), descriptors)
rounds = st.builds(
    Round,
    st.lists(asks, min_size=1, max_size=8),
    st.one_of(st.just([]), st.lists(damages, max_size=3)),
    st.one_of(st.just([]), st.just([]), st.lists(st.integers(0, SIZE), max_size=SIZE)),
)


@pytest.fixture(scope="module")
def shared_rig() -> Iterator[Rig]:
    """One rig for all examples: each begins with a reset, which is part of the test."""
    with tempfile.TemporaryDirectory() as folder:
        rig = make_rig(Path(folder) / "disk.img", queue_size=SIZE, ram_bytes=RAM_BYTES)
        yield rig
        rig.transport.close()
        rig.backend.close()


def lay_out(rig: Rig, a_round: Round, may_indirect: bool) -> tuple[list[Descriptor], list[int]]:
    """Write the round's requests into RAM; the descriptor table as it is then, and the heads."""
    table: list[Descriptor] = []
    heads: list[int] = []
    for i, ask in enumerate(a_round.asks):
        rig.memory.write(HEADERS + 16 * i, struct.pack("<IIQ", ask.type, 0, ask.sector))
        buffer = writable if ask.device_writes else readable
        chain = [readable(HEADERS + 16 * i, 16)]
        chain += [buffer(DATA + 0x1000 * j, n) for j, n in enumerate(ask.pieces)]
        chain.append(writable(STATUSES + i, 1))
        if may_indirect and ask.indirect:
            inner = b"".join(d.pack() for d in linked(chain))
            rig.memory.write(TABLES + TABLE_BYTES * i, inner)
            chain = [Descriptor(TABLES + TABLE_BYTES * i, len(inner), INDIRECT)]
        if len(table) + len(chain) > SIZE:
            break
        heads.append(len(table))
        table += linked(chain, len(table))
    table += [Descriptor(0, 0)] * (SIZE - len(table))
    for damage in a_round.damages:
        if damage.table < 0:
            table[damage.entry] = damage.descriptor
        else:
            gpa = TABLES + TABLE_BYTES * damage.table + 16 * (damage.entry % 8)
            rig.memory.write(gpa, damage.descriptor.pack())
    rig.driver.write_table(table)
    return table, heads + a_round.extra_heads


def allow(mask: bytearray, rig: Rig, table: list[Descriptor], indirect: bool) -> None:
    """Set the bytes of ``mask`` whose RAM some descriptor lets the device write."""
    for d in table:
        if d.flags & INDIRECT:
            if indirect and rig.memory.contains(d.gpa, d.length):
                inner = struct.iter_unpack("<QIHH", rig.memory.read(d.gpa, d.length & ~15))
                allow(mask, rig, [Descriptor(*i) for i in inner], False)
        elif d.flags & WRITE and d.gpa < RAM_END and d.gpa + d.length > RAM_BASE:
            first, end = max(d.gpa, RAM_BASE), min(d.gpa + d.length, RAM_END)
            mask[first - RAM_BASE : end - RAM_BASE] = b"\1" * (end - first)


def forbidden_changes(before: bytes, after: bytes, mask: bytearray) -> list[str]:
    """Where ``after`` differs from ``before`` although ``mask`` does not allow it."""
    found = []
    for page in range(0, len(before), 4096):
        old, new = before[page : page + 4096], after[page : page + 4096]
        if old != new:
            found += [
                hex(page + i) for i in range(4096) if old[i] != new[i] and not mask[page + i]
            ]
    return found


@settings(max_examples=200, deadline=None)
@given(
    features=st.sampled_from([None, None, int(Feature.VERSION_1)]),
    script=st.lists(rounds, min_size=1, max_size=4),
)
def test_random_rings(shared_rig: Rig, features: int | None, script: list[Round]) -> None:
    rig, driver = shared_rig, shared_rig.driver
    driver.start(features)
    size_before = rig.path.stat().st_size
    offered: Counter[int] = Counter()
    returned: Counter[int] = Counter()
    for a_round in script:
        table, heads = lay_out(rig, a_round, may_indirect=features is None)
        mask = bytearray(RAM_BYTES)
        allow(mask, rig, table, features is None)
        # A request that overwrites the table of a later one makes ``mask`` out of date.
        assume(not any(mask[TABLES - RAM_BASE : DATA - RAM_BASE]))
        used = driver.used - RAM_BASE
        mask[used : used + 4 + 8 * SIZE] = b"\1" * (4 + 8 * SIZE)
        driver.offer(*heads)
        offered.update(heads)
        before = bytes(rig.ram)
        driver.notify()
        assert forbidden_changes(before, bytes(rig.ram), mask) == []
        returned.update(used.head for used in driver.reap())
        if driver.needs_reset:
            break
        assert returned == offered, "a head was lost, or returned twice"
    assert returned <= offered
    assert rig.path.stat().st_size == size_before
    assert driver.reg(Register.MAGIC_VALUE) == int.from_bytes(b"virt", "little")
