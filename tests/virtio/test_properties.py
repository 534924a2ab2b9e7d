"""Property tests: whatever is in the rings, the transport survives it and touches only what the
driver gave it to write."""

from __future__ import annotations

import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyvmm.virtio.spec import BlockFeature, Feature, Register
from tests.support.packed_driver import PackedDriver
from tests.support.random_rings import (
    DATA,
    RAM_BYTES,
    SIZE,
    TABLES,
    Round,
    forbidden_changes,
    lay_out,
    permit,
    place_round,
    rounds,
)
from tests.support.rig import Rig, make_rig
from tests.support.virtio_driver import INDIRECT, RAM_BASE, WRITE, Descriptor

BASE = int(Feature.VERSION_1 | BlockFeature.FLUSH | BlockFeature.DISCARD)
ring_features = st.sampled_from(
    [
        BASE | int(feature)
        for feature in (
            Feature.INDIRECT_DESC,
            Feature.INDIRECT_DESC | Feature.EVENT_IDX,
            Feature.INDIRECT_DESC | Feature.IN_ORDER,
            Feature(0),
        )
    ]
)


@pytest.fixture(scope="module")
def shared_rig() -> Iterator[Rig]:
    """One rig for all examples: each begins with a reset, which is part of the test."""
    with tempfile.TemporaryDirectory() as folder:
        rig = make_rig(Path(folder) / "disk.img", queue_size=SIZE, ram_bytes=RAM_BYTES)
        yield rig
        rig.transport.close()
        rig.backend.close()


def allow(mask: bytearray, rig: Rig, table: list[Descriptor], layout: str, indirect: bool) -> None:
    """Permit what some descriptor of ``table`` lets the device write; ``layout`` is how the
    indirect ones are packed."""
    for d in table:
        if d.flags & INDIRECT:
            if indirect and rig.memory.contains(d.gpa, d.length):
                inner = struct.iter_unpack("<QIHH", rig.memory.read(d.gpa, d.length & ~15))
                flags_at = 2 if layout == "split" else 3
                outer = [Descriptor(i[0], i[1], i[flags_at]) for i in inner]
                if layout == "packed":  # there no other flag means anything
                    outer = [o._replace(flags=o.flags & WRITE) for o in outer]
                allow(mask, rig, outer, layout, False)
        elif d.flags & WRITE:
            permit(mask, d.gpa, d.length)


def notify(rig: Rig) -> None:
    """Notify, then serve what a pass with very large buffers left, as the machine's thread does."""
    rig.driver.notify()
    for _ in range(SIZE):
        if rig.transport.service(0) is None:
            return


@settings(max_examples=200, deadline=None)
@given(features=ring_features, script=st.lists(rounds, min_size=1, max_size=4))
def test_random_split_rings(shared_rig: Rig, features: int, script: list[Round]) -> None:
    rig, driver = shared_rig, shared_rig.driver
    driver.start(features)
    size_before = rig.path.stat().st_size
    offered: Counter[int] = Counter()
    returned: Counter[int] = Counter()
    for a_round in script:
        indirect = bool(features & Feature.INDIRECT_DESC)
        table, heads = lay_out(driver, a_round, indirect)
        mask = bytearray(RAM_BYTES)
        allow(mask, rig, table, "split", indirect)
        # A request that overwrites the table of a later one makes ``mask`` out of date.
        assume(not any(mask[TABLES - RAM_BASE : DATA - RAM_BASE]))
        permit(mask, driver.used, 6 + 8 * SIZE)
        driver.offer(*heads)
        offered.update(heads)
        before = bytes(rig.ram)
        notify(rig)
        assert forbidden_changes(before, bytes(rig.ram), mask) == []
        done = [used.head for used in driver.reap()]
        returned.update(done)
        assert done == heads[: len(done)], "not in order"
        if driver.needs_reset:
            break
        assert returned == offered, "a head was lost, or returned twice"
        assert not driver.is_quiet()
    assert returned <= offered
    assert rig.path.stat().st_size == size_before
    assert driver.reg(Register.MAGIC_VALUE) == int.from_bytes(b"virt", "little")


@settings(max_examples=200, deadline=None)
@given(features=ring_features, script=st.lists(rounds, min_size=1, max_size=4))
def test_random_packed_rings(shared_rig: Rig, features: int, script: list[Round]) -> None:
    rig = shared_rig
    driver = PackedDriver(rig.transport, rig.memory, size=SIZE)
    driver.start(features | Feature.RING_PACKED)
    size_before = rig.path.stat().st_size
    for a_round in script:
        indirect = bool(features & Feature.INDIRECT_DESC)
        placed = place_round(driver, a_round, indirect)
        ring = [
            Descriptor(gpa, length, flags)
            for gpa, length, _, flags in struct.iter_unpack(
                "<QIHH", rig.memory.read(driver.desc, 16 * SIZE)
            )
        ]
        mask = bytearray(RAM_BYTES)
        allow(mask, rig, ring, "packed", indirect)
        assume(not any(mask[TABLES - RAM_BASE : DATA - RAM_BASE]))
        permit(mask, driver.desc, 16 * SIZE)
        permit(mask, driver.used, 4)
        before = bytes(rig.ram)
        notify(rig)
        assert forbidden_changes(before, bytes(rig.ram), mask) == []
        if a_round.damages:
            break  # whose slot is whose nobody can say any more
        assert not driver.needs_reset
        assert [used.head for used in driver.reap()] == placed
        assert not driver.is_quiet()
    assert rig.path.stat().st_size == size_before
    assert driver.reg(Register.MAGIC_VALUE) == int.from_bytes(b"virt", "little")
