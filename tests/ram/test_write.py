"""RAM in files: the same bytes, holes for zeroes, CRCs that find damage, errors of full disks."""

from __future__ import annotations

import errno
import os
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import HostError
from pyvmm.memory import GuestMemory
from pyvmm.ram.image import RamImage
from pyvmm.ram.write import (
    CHUNK,
    Written,
    chunk_crcs,
    image_in_memory,
    write_ram,
    zero_crc,
)
from tests.support.ram_images import MIB, PAGE, REGIONS, SIZE, content, in_use, put, scattered

CHUNKS = -(-SIZE // CHUNK)


def check(fd: int, written: Written) -> None:
    """Every chunk's CRC is as it was written, or that of zeroes."""
    seen = dict(chunk_crcs(fd, SIZE, written.runs))
    assert written.crcs.keys() <= seen.keys()
    for chunk, crc in seen.items():
        covered = sum(
            max(0, min(offset + length, (chunk + 1) * CHUNK) - max(offset, chunk * CHUNK))
            for offset, length in written.runs or ((0, SIZE),)
        )
        assert crc == written.crcs.get(chunk, zero_crc(covered))


def test_a_file_is_the_ram_and_holes(tmp_path: Path) -> None:
    with GuestMemory(REGIONS) as memory, (tmp_path / "ram").open("w+b") as file:
        scattered(memory)
        put(memory, MIB, bytes(MIB))  # touched, and zero all the same
        written = write_ram(memory, file.fileno())
        assert file.read() == content(memory)
        assert written.runs is None
        assert 0 < written.held_bytes < SIZE
        assert os.fstat(file.fileno()).st_blocks * 512 <= written.held_bytes + MIB
        check(file.fileno(), written)


def test_a_crc_is_that_of_its_mib_of_the_file(tmp_path: Path) -> None:
    with GuestMemory(REGIONS) as memory, (tmp_path / "ram").open("w+b") as file:
        put(memory, CHUNK + 70_000, b"x")
        put(memory, SIZE - 1, b"y")
        written = write_ram(memory, file.fileno())
        data = file.read()
        assert written.crcs == {
            number: zlib.crc32(data[number * CHUNK : (number + 1) * CHUNK])
            for number in (1, CHUNKS - 1)
        }


def test_ram_that_nobody_touched_is_one_hole(tmp_path: Path) -> None:
    with GuestMemory(REGIONS) as memory, (tmp_path / "ram").open("w+b") as file:
        written = write_ram(memory, file.fileno())
        assert written == Written(0, {}, None)
        assert os.fstat(file.fileno()).st_size == SIZE
        assert os.fstat(file.fileno()).st_blocks == 0


PLACES = st.lists(
    st.tuples(st.integers(0, SIZE // PAGE - 1), st.binary(min_size=1, max_size=20)), max_size=12
)


@settings(max_examples=40, deadline=None)
@given(image=PLACES, own=PLACES)
def test_a_diff_over_its_base_is_the_ram(
    image: list[tuple[int, bytes]], own: list[tuple[int, bytes]]
) -> None:
    before = in_use()
    with GuestMemory(REGIONS) as memory:
        for page, text in image:
            put(memory, page * PAGE, text)
        base = image_in_memory(memory)
    with base, GuestMemory(REGIONS, image=base) as clone:
        for page, text in own:
            put(clone, page * PAGE + 99, text)
        fd = os.memfd_create("diff", os.MFD_ALLOW_SEALING)
        written = write_ram(clone, fd, over=base)
        assert written.runs is not None
        check(fd, written)
        with base.over_memfd(fd, written.runs) as diff, GuestMemory(REGIONS, image=diff) as again:
            assert content(again) == content(clone)
    assert in_use() == before


@settings(max_examples=40, deadline=None)
@given(image=PLACES, own=PLACES)
def test_a_whole_image_of_a_clone_is_its_ram(
    image: list[tuple[int, bytes]], own: list[tuple[int, bytes]]
) -> None:
    with GuestMemory(REGIONS) as memory:
        for page, text in image:
            put(memory, page * PAGE, text)
        base = image_in_memory(memory)
    with base, GuestMemory(REGIONS, image=base) as clone:
        for page, text in own:
            put(clone, page * PAGE, text if page % 3 else bytes(PAGE))
        fd = os.memfd_create("whole", os.MFD_ALLOW_SEALING)
        written = write_ram(clone, fd)
        check(fd, written)
        with RamImage.from_memfd(fd, SIZE) as whole, GuestMemory(REGIONS, image=whole) as again:
            assert content(again) == content(clone)


def test_every_flipped_byte_of_data_is_found(tmp_path: Path) -> None:
    with GuestMemory(REGIONS) as memory, (tmp_path / "ram").open("w+b") as file:
        scattered(memory)
        written = write_ram(memory, file.fileno())
        fd = file.fileno()
        for at in range(0, SIZE, 99_991):
            byte = os.pread(fd, 1, at)
            os.pwrite(fd, bytes([byte[0] ^ 1 << at % 8]), at)
            damaged = [
                chunk for chunk, crc in chunk_crcs(fd, SIZE, None)
                if crc != written.crcs.get(chunk, zero_crc(min(CHUNK, SIZE - chunk * CHUNK)))
            ]
            assert damaged == [at // CHUNK]
            os.pwrite(fd, byte, at)


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    with GuestMemory(REGIONS) as memory, (tmp_path / "ram").open("w+b") as file:
        write_ram(memory, file.fileno())
        os.truncate(file.fileno(), SIZE - 1)
        with pytest.raises(HostError, match=f"ends at {SIZE - 1}"):
            list(chunk_crcs(file.fileno(), SIZE, None))


def test_short_writes_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:50_001], at))
    with GuestMemory(REGIONS) as memory, (tmp_path / "ram").open("w+b") as file:
        put(memory, 0, b"x" * 3 * MIB)
        written = write_ram(memory, file.fileno())
        assert file.read() == content(memory)
        check(file.fileno(), written)


@pytest.mark.parametrize("allowed", [0, 1, 5])
def test_a_full_disk_is_an_oserror(
    allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, [allowed]

    def full(fd: int, data: memoryview, at: int) -> int:
        calls[0] -= 1
        if calls[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    with GuestMemory(REGIONS) as memory, (tmp_path / "ram").open("w+b") as file:
        scattered(memory)
        before = in_use()
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            write_ram(memory, file.fileno())
        with pytest.raises(HostError, match="No space left"):
            image_in_memory(memory)
        monkeypatch.undo()
        assert in_use() == before
        write_ram(memory, file.fileno())  # no view was kept
        assert file.read() == content(memory)


def test_the_ram_is_not_copied_through_python(tmp_path: Path) -> None:
    size = 64 * MIB
    with GuestMemory([(0, size)]) as memory, (tmp_path / "ram").open("w+b") as file:
        memory.write(0, os.urandom(MIB) * 48)
        tracemalloc.start()
        try:
            write_ram(memory, file.fileno())
            assert tracemalloc.get_traced_memory()[1] < MIB // 4
        finally:
            tracemalloc.stop()
