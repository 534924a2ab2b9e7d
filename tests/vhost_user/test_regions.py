"""Memory a front end shares: what is mapped, what is refused, what is let go."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import GuestMemoryError
from pyvmm.vhost_user.protocol import MemoryRegion
from pyvmm.vhost_user.regions import MAX_BYTES, MAX_REGIONS, PeerMemory, UnusableRegionError
from tests.support.vhost_rig import held, memfd

PAGE = 4096
GPA, USER = 0x10_0000, 0x7F00_0000_0000


@pytest.fixture
def peer() -> Iterator[PeerMemory]:
    memory = PeerMemory()
    yield memory
    memory.close()


@pytest.fixture
def ram() -> Iterator[int]:
    """A sealed memfd of 8 pages, page i full of byte i."""
    fd = memfd(8 * PAGE)
    os.pwrite(fd, b"".join(bytes([i]) * PAGE for i in range(8)), 0)
    yield fd
    os.close(fd)


def region(page: int, pages: int, *, offset: int | None = None) -> MemoryRegion:
    """``pages`` pages, the ``page``-th of guest RAM, of the user's and of the file."""
    offset = page * PAGE if offset is None else offset
    return MemoryRegion(GPA + page * PAGE, pages * PAGE, USER + page * PAGE, offset)


def test_addresses_of_both_kinds(peer: PeerMemory, ram: int) -> None:
    peer.add(MemoryRegion(0, PAGE, USER, 3 * PAGE), ram)
    peer.add(MemoryRegion(1 << 32, PAGE, USER - PAGE, 5 * PAGE), ram)
    assert peer.memory.read(PAGE - 1, 1) == b"\3"
    assert peer.memory.read(1 << 32, 2) == b"\5\5"
    assert peer.gpa_of(USER + 7) == 7
    assert peer.gpa_of(USER - 1) == (1 << 32) + PAGE - 1
    assert peer.gpa_of(USER + PAGE) is None
    assert peer.gpa_of(-1) is None
    assert not peer.memory.contains(PAGE - 1, 2)


def test_memory_is_shared_both_ways(peer: PeerMemory, ram: int) -> None:
    peer.add(region(0, 8), ram)
    peer.memory.write(GPA + 100, b"device")
    os.pwrite(ram, b"driver", 200)
    assert os.pread(ram, 6, 100) == b"device"
    assert peer.memory.read(GPA + 200, 6) == b"driver"


def test_an_offset_and_a_size_that_are_no_whole_pages(peer: PeerMemory, ram: int) -> None:
    peer.add(MemoryRegion(GPA, 5000, USER, 2 * PAGE - 10), ram)
    assert peer.memory.read(GPA, 5000) == b"\1" * 10 + b"\2" * PAGE + b"\3" * (5000 - 10 - PAGE)
    with pytest.raises(GuestMemoryError):
        peer.memory.view(GPA, 5001)


def test_nothing_is_left_of_what_is_removed(peer: PeerMemory, ram: int) -> None:
    before = held()
    peer.add(region(0, 4), ram)
    peer.add(region(4, 4), ram)
    peer.remove(region(0, 4, offset=77))
    assert not peer.memory.contains(GPA, 1)
    assert peer.gpa_of(USER) is None
    assert peer.memory.contains(GPA + 4 * PAGE, 4 * PAGE)
    peer.replace([(region(0, 1), ram), (region(1, 7), ram)])
    assert peer.memory.read(GPA + PAGE, 1) == b"\1"
    peer.close()
    peer.close()
    assert peer.memory.regions == ()
    assert held() == before


@pytest.mark.parametrize(
    "wrong",
    [
        region(0, 4)._replace(size=PAGE),
        region(0, 4)._replace(gpa=GPA + 1),
        region(0, 4)._replace(user_address=USER + PAGE),
    ],
)
def test_removing_what_is_not_there(peer: PeerMemory, ram: int, wrong: MemoryRegion) -> None:
    peer.add(region(0, 4), ram)
    with pytest.raises(UnusableRegionError, match="is not mapped"):
        peer.remove(wrong)
    assert peer.memory.contains(GPA, 4 * PAGE)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (region(0, 0), "is empty"),
        (region(0, 9), "leaves it: it has 0x8000 bytes"),
        (region(0, 8, offset=1), "leaves it"),
        (region(0, 1, offset=(1 << 64) - PAGE), "leaves it"),
        (region(0, 1)._replace(gpa=(1 << 64) - PAGE + 1), "beyond 2.64"),
        (region(0, 1)._replace(user_address=(1 << 64) - 1), "beyond 2.64"),
        (region(0, 1)._replace(size=(1 << 64) - 1), "over"),
        (region(0, 1)._replace(size=MAX_BYTES + 1), "over 1099511627776 bytes"),
    ],
)
def test_a_region_that_cannot_be(
    peer: PeerMemory, ram: int, bad: MemoryRegion, problem: str
) -> None:
    before = held()
    with pytest.raises(UnusableRegionError, match=problem):
        peer.add(bad, ram)
    with pytest.raises(UnusableRegionError, match=problem):
        peer.replace([(region(40, 1, offset=0), ram), (bad, ram)])
    assert peer.memory.regions == ()
    assert held() == before


@pytest.mark.parametrize(
    "other",
    [
        region(2, 1),
        region(3, 2),
        region(2, 1)._replace(gpa=0),
        region(2, 1)._replace(user_address=0),
        region(1, 3),
    ],
)
def test_regions_that_overlap(peer: PeerMemory, ram: int, other: MemoryRegion) -> None:
    peer.add(region(2, 2), ram)
    with pytest.raises(UnusableRegionError, match="overlaps the region of 0x2000 bytes at GPA"):
        peer.add(other, ram)
    with pytest.raises(UnusableRegionError, match="overlaps"):
        peer.replace([(other, ram), (region(2, 2), ram)])
    assert [one.length for one in peer.memory.regions] == [2 * PAGE]


def test_as_many_regions_as_are_offered(peer: PeerMemory, ram: int) -> None:
    for i in range(MAX_REGIONS):
        peer.add(region(i, 1, offset=0), ram)
    with pytest.raises(UnusableRegionError, match=f"one more than {MAX_REGIONS}"):
        peer.add(region(MAX_REGIONS, 1, offset=0), ram)


def test_memory_that_may_shrink(peer: PeerMemory, tmp_path: Path) -> None:
    unsealed = memfd(PAGE, seals=0)
    grows_only = memfd(PAGE, seals=fcntl.F_SEAL_SHRINK)
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE))
    file = os.open(path, os.O_RDWR)
    for fd in (unsealed, file):
        with pytest.raises(UnusableRegionError, match=r"memory-backend-memfd.*--trust-memory"):
            peer.add(region(0, 1), fd)
    peer.add(region(0, 1), grows_only)
    trusting = PeerMemory(trust=True)
    trusting.add(region(0, 1), unsealed)
    trusting.add(region(1, 1, offset=0), file)
    trusting.memory.write(GPA + PAGE, b"through")
    assert path.read_bytes()[:7] == b"through"
    trusting.close()
    for fd in (unsealed, grows_only, file):
        os.close(fd)


def test_what_cannot_be_mapped_at_all(tmp_path: Path) -> None:
    trusting = PeerMemory(trust=True)
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE))
    read_only = os.open(path, os.O_RDONLY)
    reader, writer = os.pipe()
    for fd in (read_only, reader, writer):
        with pytest.raises(UnusableRegionError):
            trusting.add(region(0, 1), fd)
        os.close(fd)
    with pytest.raises(UnusableRegionError, match="Bad file descriptor"):
        trusting.add(region(0, 1), read_only)
    assert trusting.memory.regions == ()


def test_huge_pages(peer: PeerMemory) -> None:
    """A file of huge pages is mapped from the beginning of one to the end of one."""
    huge = 2 << 20
    fd = os.memfd_create("peer-ram", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(fd, 2 * huge)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    part = MemoryRegion(GPA, PAGE, USER, huge + 3 * PAGE)
    problem = ""
    try:
        peer.add(part, fd)
    except UnusableRegionError as error:
        problem = str(error)
    if problem:  # this host has none to spare; but it was asked for whole ones
        assert "Cannot allocate memory" in problem
    else:
        peer.memory.write(GPA, b"through")
        with mmap.mmap(fd, huge, offset=huge) as page:
            assert page[3 * PAGE : 3 * PAGE + 7] == b"through"
    os.close(fd)


_U64 = st.one_of(
    st.integers(0, 10 * PAGE),
    st.sampled_from([USER, GPA, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.builds(MemoryRegion, _U64, _U64, _U64, _U64), max_size=6))
def test_any_numbers_at_all(described: list[MemoryRegion]) -> None:
    fd = memfd(8 * PAGE)
    before = held()
    peer = PeerMemory()
    for one in described:
        try:
            peer.add(one, fd)
        except UnusableRegionError:
            continue
        assert peer.memory.contains(one.gpa, one.size)
        assert len(peer.memory.view(one.gpa, one.size)) == one.size
        assert peer.gpa_of(one.user_address) == one.gpa
        assert one.mmap_offset + one.size <= 8 * PAGE
    peer.close()
    assert held() == before
    os.close(fd)
