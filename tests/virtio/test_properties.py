"""Property test: whatever is in the rings, the transport survives it and touches only what the
driver gave it to write."""

from __future__ import annotations

import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.virtio.spec import Feature, Register
from tests.support.rig import DISK_SECTORS, RAM_BYTES, Rig, make_rig
from tests.support.virtio_driver import INDIRECT, RAM_BASE, WRITE, Descriptor

SIZE = 16
# The areas of the arena: headers to point at, tables to be indirect, data.
HEADERS = RAM_BASE + 0x1000
TABLES = RAM_BASE + 0x2000
DATA = RAM_BASE + 0x3000
RAM_END = RAM_BASE + RAM_BYTES
TABLE_ENTRIES = 8

gpas = st.one_of(
    st.integers(0, 7).map(lambda i: HEADERS + 16 * i),
    st.integers(0, 7).map(lambda i: HEADERS + 16 * i),
    st.integers(0, 3).map(lambda i: TABLES + 16 * TABLE_ENTRIES * i),
    st.integers(0, 64).map(lambda i: DATA + 256 * i),
    st.sampled_from([0, RAM_BASE - 1, RAM_END - 8, RAM_END, 2**63, 2**64 - 16, 2**64 - 1]),
)
lengths = st.one_of(
    st.sampled_from([0, 1, 8, 16, 16, 16, 32, 48, 128, 511, 512, 512, 513, 1024, 4096]),
    st.integers(0, 2**32 - 1),
)
flags = st.one_of(st.sampled_from([0, 1, 1, 1, 2, 2, 3, 3, 4]), st.integers(0, 0xFFFF))


def descriptors(entries: int) -> st.SearchStrategy[Descriptor]:
    """Descriptors whose ``next`` is mostly inside a table of ``entries``."""
    following = st.one_of(st.integers(0, entries - 1), st.integers(0, 0xFFFF))
    return st.builds(Descriptor, gpas, lengths, flags, following)


headers = st.tuples(
    st.sampled_from([0, 0, 0, 1, 1, 4, 8, 8, 11, 77]),
    st.one_of(st.integers(0, DISK_SECTORS + 2), st.integers(0, 2**64 - 1)),
)
passes = st.lists(
    st.tuples(
        st.lists(
            st.one_of(st.integers(0, SIZE - 1), st.integers(0, SIZE + 1)), max_size=SIZE + 1
        ),
        st.lists(descriptors(SIZE), min_size=SIZE, max_size=SIZE),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def shared_rig() -> Iterator[Rig]:
    """One rig for all examples: each begins with a reset, which is part of the test."""
    with tempfile.TemporaryDirectory() as folder:
        rig = make_rig(Path(folder) / "disk.img", queue_size=SIZE)
        yield rig
        rig.transport.close()
        rig.backend.close()


def writable_bytes(rig: Rig, table: list[Descriptor], indirect: bool) -> set[int]:
    """Every byte of RAM, as an offset, that some descriptor lets the device write."""
    allowed: set[int] = set()
    for d in table:
        if d.flags & INDIRECT and indirect and rig.memory.contains(d.gpa, d.length):
            inner = struct.iter_unpack("<QIHH", rig.memory.read(d.gpa, d.length & ~15))
            allowed |= writable_bytes(rig, [Descriptor(*i) for i in inner][:SIZE], False)
        elif d.flags & WRITE and d.gpa < RAM_END and d.gpa + d.length > RAM_BASE:
            first, end = max(d.gpa, RAM_BASE), min(d.gpa + d.length, RAM_END)
            allowed.update(range(first - RAM_BASE, end - RAM_BASE))
    return allowed


def changed(before: bytes, after: bytes) -> set[int]:
    """The offsets at which they differ."""
    offsets: set[int] = set()
    for page in range(0, len(before), 4096):
        old, new = before[page : page + 4096], after[page : page + 4096]
        if old != new:
            offsets.update(page + i for i in range(4096) if old[i] != new[i])
    return offsets


@settings(max_examples=200, deadline=None)
@given(
    features=st.sampled_from([int(Feature.VERSION_1), None]),
    header_list=st.lists(headers, min_size=8, max_size=8),
    inner=st.lists(descriptors(TABLE_ENTRIES), min_size=32, max_size=32),
    rounds=passes,
)
def test_random_rings(
    shared_rig: Rig,
    features: int | None,
    header_list: list[tuple[int, int]],
    inner: list[Descriptor],
    rounds: list[tuple[list[int], list[Descriptor]]],
) -> None:
    rig, driver = shared_rig, shared_rig.driver
    driver.start(features)
    for i, (request_type, sector) in enumerate(header_list):
        rig.memory.write(HEADERS + 16 * i, struct.pack("<IIQ", request_type, 0, sector))
    size_before = rig.path.stat().st_size
    offered: Counter[int] = Counter()
    returned: Counter[int] = Counter()
    for heads, table in rounds:
        rig.memory.write(TABLES, b"".join(d.pack() for d in inner))
        driver.write_table(table)
        allowed = writable_bytes(rig, table, features is None)
        used_area = range(driver.used - RAM_BASE, driver.used - RAM_BASE + 6 + 8 * SIZE)
        driver.offer(*heads)
        offered.update(heads)
        before = bytes(rig.ram)
        driver.notify()
        assert changed(before, bytes(rig.ram)) <= allowed.union(used_area)
        if driver.needs_reset:
            break
        returned.update(used.head for used in driver.reap())
        assert not rig.transport.service(0)
        assert returned == offered, "a head was lost, or returned twice"
    returned.update(used.head for used in driver.reap())
    assert returned <= offered
    assert rig.path.stat().st_size == size_before
    assert rig.driver.reg(Register.MAGIC_VALUE) == int.from_bytes(b"virt", "little")
