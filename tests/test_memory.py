"""GuestMemory: every access is checked; what is outside RAM raises, whatever the numbers are."""

from __future__ import annotations

import errno
import mmap
import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import GuestMemoryError, HostError
from pyvmm.memory import GuestMemory, RamLayer
from pyvmm.x86 import layout

LOW, GAP_END, HIGH = 0x8000, 0x20000, 0x4000


def two_regions() -> GuestMemory:
    return GuestMemory([(0, LOW), (GAP_END, HIGH)])


def test_writes_are_read_back_in_both_regions() -> None:
    with two_regions() as memory:
        memory.write(0x10, b"low")
        memory.write(GAP_END + HIGH - 4, b"high")
        assert memory.read(0x10, 3) == b"low"
        assert memory.read(GAP_END + HIGH - 4, 4) == b"high"
        assert memory.size_bytes == LOW + HIGH


def test_regions_are_contiguous_in_the_one_mapping() -> None:
    with two_regions() as memory:
        assert [(r.gpa, r.length, r.offset) for r in memory.regions] == [
            (0, LOW, 0), (GAP_END, HIGH, LOW)
        ]


MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ranges", [
    [(0, 2 * MIB)],
    [(0, 256 * MIB)],
    [(0, 63 * MIB + 4096)],
    layout.ram_ranges(3 * GIB),
    layout.ram_ranges(4 * GIB + 6 * MIB + 4096),
    layout.ram_ranges(6 * GIB),
    [(0x5000, 5 * MIB), (7 * MIB, 4096), (0x1234_5000, 3 * MIB), (5 * GIB + 0x7000, GIB + 4096)],
])  # fmt: skip
def test_fault_44_host_and_guest_addresses_agree_modulo_2_mib(
    ranges: list[tuple[int, int]], shared: bool
) -> None:
    """Linux before 6.7 puts a mapping wherever it falls: so here, behind one of odd size."""
    for pages in (1, 3, 7):
        with mmap.mmap(-1, pages * 4096), GuestMemory(ranges, shared=shared) as memory:
            assert [(r.gpa, r.length) for r in memory.regions] == ranges
            for region in (r for r in memory.regions if r.length >= 2 * MIB):
                modulus = GIB if region.length >= GIB else 2 * MIB
                assert region.host_address % modulus == region.gpa % modulus
                # A page of the file can be huge only where file and memory agree, too.
                assert region.offset % modulus == region.gpa % modulus


@pytest.mark.parametrize("shared", [False, True])
def test_without_room_to_align_there_is_ram_all_the_same(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 3 * MIB

    def crowded(fd: int, size: int, *more: object, **options: int) -> mmap.mmap:
        if size > length:
            raise OSError(errno.ENOMEM, "no room")
        return mmap.mmap(fd, size, **options)

    fake = types.SimpleNamespace(**{**vars(mmap), "mmap": crowded})
    monkeypatch.setattr("pyvmm.memory.mmap", fake)
    with GuestMemory([(0, length)], shared=shared) as memory:
        memory.write(length - 4, b"last")
        assert memory.read(length - 4, 4) == b"last"


@pytest.mark.parametrize("shared", [False, True])
def test_all_ram_goes_with_the_memory(shared: bool) -> None:
    maps = Path("/proc/self/maps")
    memory = GuestMemory([(0, 2 * MIB), (GIB, 2 * MIB)], shared=shared)
    addresses = [f"{region.host_address:x}-" for region in memory.regions]
    assert any(address in maps.read_text("ascii") for address in addresses)
    memory.close()
    assert not any(address in maps.read_text("ascii") for address in addresses)


@pytest.mark.parametrize("shared", [False, True])
def test_the_regions_are_one_memory_of_their_own_bytes(shared: bool) -> None:
    with GuestMemory([(0, LOW), (GAP_END, HIGH)], shared=shared) as memory:
        for region in memory.regions:
            memory.write(region.gpa, bytes([region.gpa >> 12 & 0xFF]) * region.length)
        for region in memory.regions:
            assert set(memory.read(region.gpa, region.length)) == {region.gpa >> 12 & 0xFF}
            if memory.fd is not None:
                content = os.pread(memory.fd, region.length, region.offset)
                assert content == memory.read(region.gpa, region.length)


def test_integers_are_little_endian_and_range_checked() -> None:
    with two_regions() as memory:
        memory.write_int(8, 4, 0x11223344)
        assert memory.read(8, 4) == bytes.fromhex("44332211")
        assert memory.read_int(8, 2) == 0x3344
        with pytest.raises(OverflowError):
            memory.write_int(8, 2, 0x10000)


def test_a_view_is_the_ram_itself() -> None:
    with two_regions() as memory:
        with memory.view(0x100, 4) as view:
            view[:] = b"abcd"
        assert memory.read(0x100, 4) == b"abcd"


@given(gpa=st.integers(-(1 << 65), 1 << 65), length=st.integers(-(1 << 33), 1 << 65))
def test_no_address_gives_bytes_outside_ram(gpa: int, length: int) -> None:
    with two_regions() as memory:
        inside = length >= 0 and (
            (gpa >= 0 and gpa + length <= LOW)
            or (gpa >= GAP_END and gpa + length <= GAP_END + HIGH)
        )
        assert memory.contains(gpa, length) == inside
        if inside:
            assert len(memory.read(gpa, length)) == length
        else:
            with pytest.raises(GuestMemoryError) as caught:
                memory.view(gpa, length)
            assert (caught.value.gpa, caught.value.length) == (gpa, length)


def test_an_access_across_the_hole_is_refused() -> None:
    with two_regions() as memory, pytest.raises(GuestMemoryError):
        memory.write(LOW - 1, b"xx")


def test_shared_memory_is_seen_through_its_fd() -> None:
    with GuestMemory([(0, 0x2000)], shared=True) as memory:
        assert memory.fd is not None
        memory.write(0x1000, b"shared")
        with mmap.mmap(memory.fd, 0x2000) as other:
            assert other[0x1000:0x1006] == b"shared"
        fd = memory.fd
    with pytest.raises(OSError):  # noqa: PT011 - EBADF: the fd was closed with the memory
        os.fstat(fd)


def test_close_is_idempotent() -> None:
    memory = two_regions()
    memory.close()
    memory.close()


@pytest.mark.parametrize("shared", [False, True])
def test_fault_11_a_view_that_somebody_keeps_does_not_fail_the_end(shared: bool) -> None:
    memory = GuestMemory([(0, 4096)], shared=shared)
    view = memory.view(0, 4)
    memory.close()
    memory.close()
    view[:] = b"kept"
    assert bytes(view) == b"kept"


def test_memory_the_host_cannot_map_is_a_host_error() -> None:
    with pytest.raises(HostError, match="guest RAM"):
        GuestMemory([(0, 1 << 62)])


def test_over_a_buffer_of_the_callers() -> None:
    buffer = bytearray(0x1000)
    memory = GuestMemory.over(buffer, gpa=0x4000)
    memory.write(0x4001, b"x")
    assert buffer[1] == ord("x")
    with pytest.raises(GuestMemoryError):
        memory.read(0x3FFF, 1)
    memory.close()
    buffer.append(0)  # no view is left that would forbid it


def test_private_memory_is_not_a_file() -> None:
    with two_regions() as memory:
        assert memory.fd is None
        address = hex(memory.regions[0].host_address)[2:]
        assert address in Path("/proc/self/maps").read_text("ascii")


def test_shared_memory_cannot_be_shrunk_by_whoever_gets_it() -> None:
    with GuestMemory([(0, 8192)], shared=True) as memory:
        assert memory.fd is not None
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 0)


def test_regions_come_and_go() -> None:
    memory = GuestMemory.empty()
    low, high = bytearray(b"low."), bytearray(b"high")
    memory.add(GAP_END, high)
    region = memory.add(0x1000, low)
    assert [(r.gpa, r.end) for r in memory.regions] == [(0x1000, 0x1004), (GAP_END, GAP_END + 4)]
    assert memory.read(0x1000, 4) == b"low."
    memory.write(GAP_END, b"HIGH")
    assert high == b"HIGH"
    memory.remove(region)
    assert not memory.contains(0x1000, 1)
    low += b"free again"


@pytest.mark.parametrize("gpa", [0xFFF, 0x1003, 0xFFE, -1, (1 << 64) - 3])
def test_a_region_that_overlaps_or_wraps_is_refused(gpa: int) -> None:
    memory = GuestMemory.over(bytearray(4), 0x1000)
    with pytest.raises(GuestMemoryError):
        memory.add(gpa, bytearray(4))
    with pytest.raises(GuestMemoryError):
        memory.add(0x2000, bytearray())
    assert len(memory.regions) == 1


class Image:
    """An image of one file, which counts the handles of it."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.layers: tuple[RamLayer, ...] = (RamLayer(fd, None),)
        self.handles = 1

    def share(self) -> Image:
        self.handles += 1
        return self

    def close(self) -> None:
        self.handles -= 1


@pytest.fixture
def image() -> Iterator[Image]:
    fd = os.memfd_create("image")
    os.ftruncate(fd, LOW + HIGH)
    os.pwrite(fd, b"low", 0x100)
    os.pwrite(fd, b"high", LOW + 0x200)
    yield Image(fd, LOW + HIGH)
    os.close(fd)


def test_ram_begins_as_its_image_and_never_changes_it(image: Image) -> None:
    with GuestMemory([(0, LOW), (GAP_END, HIGH)], image=image) as memory:
        assert memory.image is image
        assert [region.position for region in memory.regions] == [0, LOW]
        assert memory.read(0x100, 3) == b"low"
        assert memory.read(GAP_END + 0x200, 4) == b"high"
        memory.write(0x100, b"own")
        memory.write(GAP_END + 0x200, b"mine")
        assert os.pread(image.fd, 3, 0x100) == b"low"
        memory.drop_own_pages([(LOW, 4096)])
        assert memory.read(0x100, 3) == b"own"
        assert memory.read(GAP_END + 0x200, 4) == b"high"
        memory.drop_own_pages([(0, LOW + HIGH)])
        assert memory.read(0x100, 3) == b"low"
        assert image.handles == 2
    assert image.handles == 1


@pytest.mark.parametrize("ranges", [
    [(0, 4 * MIB)],
    [(0, 3 * MIB + 4096), (GIB, 2 * MIB)],
    layout.ram_ranges(3 * GIB + 2 * MIB),
])  # fmt: skip
def test_an_image_takes_the_place_of_ram_at_the_same_addresses(
    ranges: list[tuple[int, int]]
) -> None:
    size = sum(length for _, length in ranges)
    fd = os.memfd_create("image")
    os.ftruncate(fd, size)
    with GuestMemory(ranges) as memory:
        views = [memory.view(region.gpa, region.length) for region in memory.regions]
        addresses = [region.host_address for region in memory.regions]
        for region in memory.regions:
            memory.write(region.gpa + 0x1000, b"lost")  # it may have got a huge page
            os.pwrite(fd, b"kept", region.position + 0x1000)
        image = Image(fd, size)
        memory.map_image(image)
        assert [region.host_address for region in memory.regions] == addresses
        for view in views:
            assert bytes(view[0x1000:0x1004]) == b"kept"
            view.release()
        memory.map_image(image)
        assert image.handles == 2
    assert image.handles == 1
    os.close(fd)


def test_an_image_of_another_size_is_refused(image: Image) -> None:
    with pytest.raises(ValueError, match=f"image has {LOW + HIGH} bytes, RAM {LOW}"):
        GuestMemory([(0, LOW)], image=image)
    assert image.handles == 1


def test_only_private_ram_has_an_image(image: Image) -> None:
    for memory in (
        GuestMemory([(0, LOW + HIGH)], shared=True), GuestMemory.over(bytearray(LOW + HIGH))
    ):
        with memory, pytest.raises(ValueError, match="private"):
            memory.map_image(image)
    with two_regions() as memory, pytest.raises(ValueError, match="no image"):
        memory.drop_own_pages([(0, LOW)])


def test_an_image_that_cannot_be_mapped_is_a_host_error(image: Image) -> None:
    maps = Path("/proc/self/maps").read_text("ascii").count("\n")
    image.layers = (RamLayer(image.fd, None), RamLayer(-1, ((0, LOW),)))
    for _ in range(3):
        with pytest.raises(HostError, match="cannot map an image of RAM: Bad file"):
            GuestMemory([(0, LOW), (GAP_END, HIGH)], image=image)
    assert image.handles == 1
    assert Path("/proc/self/maps").read_text("ascii").count("\n") <= maps + 1
