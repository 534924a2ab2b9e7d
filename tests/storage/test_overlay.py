"""OverlayBackend: the base stays, the store keeps, the file says what it is."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.fault_script import parse_script
from pyvmm.storage.faulty import FaultyBackend
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.open import DiskSource, open_backend
from pyvmm.storage.overlay import OverlayBackend
from pyvmm.storage.overlay_format import format_store, store_bytes
from tests.support.counted_buffers import CountedBuffers
from tests.support.raw_disks import opened, room

BLOCK = 4096




@contextmanager
def overlay_over(
    base: Path, overlay: Path | None, reports: list[str] | None = None
) -> Iterator[BlockBackend]:
    source = DiskSource(
        location=str(base), snapshot=True, overlay="" if overlay is None else str(overlay)
    )
    lines: list[str] = [] if reports is None else reports
    with closing(open_backend(source, report=lines.append)) as disk:
        yield disk
    if reports is None:
        assert lines == []


def content(disk: BlockBackend) -> bytes:
    buffers = room(disk.size_bytes)
    disk.readv(buffers, 0)
    return bytes(buffers[0])


def refused(base: Path, overlay: Path) -> str:
    source = DiskSource(location=str(base), snapshot=True, overlay=str(overlay))
    with pytest.raises(ConfigError) as caught:
        open_backend(source, report=print)
    assert caught.value.subject == str(overlay)
    with opened(base):
        pass  # and the base has been closed
    return caught.value.problem


def test_snapshot_leaves_the_base_and_nothing_else(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = image.read_bytes()
    with overlay_over(image, None) as disk:
        disk.writev([memoryview(b"s" * 512)], 512, durable=True)
        disk.write_zeroes(8192, 8192, unmap=True)
        disk.flush()
        expected = before[:512] + b"s" * 512 + before[1024:8192] + bytes(8192) + before[16384:]
        assert content(disk) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["disk.img"]
    assert image.read_bytes() == before
    with overlay_over(image, None) as disk:
        assert content(disk) == before


def test_overlay_keeps_what_was_written(image: Path, tmp_path: Path) -> None:
    before, overlay = image.read_bytes(), tmp_path / "o"
    with overlay_over(image, overlay) as disk:
        disk.writev([memoryview(b"s" * 1024)], 7 * 512)  # across two blocks
        expected = before[: 7 * 512] + b"s" * 1024 + before[9 * 512 :]
        assert content(disk) == expected
        disk.flush()
    with overlay_over(image, overlay) as disk:
        assert content(disk) == expected
        disk.writev([memoryview(b"t" * 512)], 8 * 512)
    with overlay_over(image, overlay) as disk:  # closing has saved it without a flush
        assert content(disk) == expected[: 8 * 512] + b"t" * 512 + expected[9 * 512 :]
    assert image.read_bytes() == before
    assert overlay.stat().st_mode & 0o777 == 0o600


def test_it_is_sparse_and_reaches_over_many_bitmap_pages(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "o"
    with base.open("wb") as file:
        file.truncate(1 << 30)
    edge = 32768 * BLOCK  # the first block of the second page of the bitmap
    data = b"e" * (4 * BLOCK)
    with overlay_over(base, overlay) as disk:
        disk.writev([memoryview(data)], edge - 2 * BLOCK)
        disk.write_zeroes(3 * edge - BLOCK, 2 * BLOCK, unmap=True)
        disk.flush()
    with overlay_over(base, overlay) as disk:
        buffers = room(6 * BLOCK)
        disk.readv(buffers, edge - 3 * BLOCK)
        assert buffers[0] == bytes(BLOCK) + data + bytes(BLOCK)
    assert overlay.stat().st_size == store_bytes(1 << 30) > 1 << 30
    assert overlay.stat().st_blocks * 512 < 20 * BLOCK


def test_discard_frees_the_store(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "o"
    base.write_bytes(b"b" * (1 << 20))
    with overlay_over(base, overlay) as disk:
        disk.writev([memoryview(b"w" * (1 << 19))], 0)
        disk.flush()
        full = overlay.stat().st_blocks
        disk.discard(0, 1 << 20)
        assert overlay.stat().st_blocks <= full - (1 << 19) // 512
        assert content(disk) == bytes(1 << 19) + b"b" * (1 << 19)


def test_base_that_ends_inside_a_block(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "o"
    base.write_bytes(b"b" * 1536)
    with overlay_over(base, overlay) as disk:
        disk.writev([memoryview(b"w" * 512)], 512)
    with overlay_over(base, overlay) as disk:
        assert content(disk) == b"b" * 512 + b"w" * 512 + b"b" * 512


def memory_overlay(
    faults: str = "", base: bytes = b"b" * (8 * BLOCK)
) -> tuple[OverlayBackend, bytearray, list[str]]:
    """An overlay in memory, with faults of its store; the store's bytes; the reports."""
    data = bytearray(store_bytes(len(base)))
    format_store(MemoryBackend(data), len(base))
    store = FaultyBackend(MemoryBackend(data), parse_script(faults, "faults"))
    reports: list[str] = []
    return OverlayBackend(
        MemoryBackend(base), store, name="o", report=reports.append
    ), data, reports


def reopened(data: bytearray, base: bytes = b"b" * (8 * BLOCK)) -> OverlayBackend:
    return OverlayBackend(MemoryBackend(base), MemoryBackend(data), name="o", report=print)


def test_a_flush_makes_blocks_stable_before_bits() -> None:
    disk, data, _ = memory_overlay("flush 2: EIO")
    disk.writev([memoryview(b"w" * 512)], BLOCK)
    assert data[BLOCK] == 0  # no bit before the flush
    with pytest.raises(OSError, match="Input/output"):
        disk.flush()
    with pytest.raises(OSError, match="earlier flush"):
        disk.flush()
    disk, data, _ = memory_overlay("flush 1: EIO")
    disk.writev([memoryview(b"w" * 512)], BLOCK)
    with pytest.raises(OSError, match="Input/output"):
        disk.flush()
    assert data[BLOCK] == 0  # no bit of a block that may not be there


@pytest.mark.parametrize("faults", ["flush 1: EIO", "write 3: EIO"])
def test_a_failure_keeps_no_buffer_of_the_callers(faults: str) -> None:
    """They are guest RAM, which the front end of an export takes back one day."""
    disk, _, _ = memory_overlay(faults)
    disk.writev([memoryview(b"w" * BLOCK)], 0)
    if "flush" not in faults:
        disk.flush()
    ram = mmap.mmap(-1, BLOCK)
    with pytest.raises(OSError, match="Input/output"):
        disk.writev([memoryview(ram)], 0, durable=True)
    ram.close()  # a BufferError while there is a view
    disk.close()


def test_fault_7_a_read_in_many_pieces_looks_at_each_buffer_once() -> None:
    """Every other block is held: as many pieces as blocks, in buffers of another size."""
    blocks, data = 512, bytearray()
    base = os.urandom(blocks * BLOCK)
    data.extend(bytes(store_bytes(len(base))))
    store = MemoryBackend(data)
    format_store(store, len(base))
    disk = OverlayBackend(MemoryBackend(base), store, name="o", report=print)
    expected = bytearray(base)
    for block in range(0, blocks, 2):
        disk.writev([memoryview(bytes(BLOCK))], block * BLOCK)
        expected[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    before = disk.extra_calls
    ram = bytearray(len(base))
    buffers = CountedBuffers(memoryview(ram)[n : n + 1536] for n in range(0, len(ram), 1536))
    disk.readv(buffers, 0)
    assert ram == expected
    assert buffers.looks <= 2 * len(buffers), "once to measure it, once to fill it"
    assert disk.extra_calls - before == blocks
    buffers.looks = 0
    disk.writev(buffers, 0)
    assert buffers.looks <= 4 * len(buffers)
    disk.close()


def test_a_failed_flush_is_latched_and_close_says_what_is_lost() -> None:
    disk, data, reports = memory_overlay("flush 1: ENOSPC")
    disk.writev([memoryview(b"w" * 512)], BLOCK)
    with pytest.raises(OSError, match="No space"):
        disk.writev([memoryview(b"d" * 512)], 2 * BLOCK, durable=True)
    for again in (disk.flush, lambda: disk.writev(room(512), 0, durable=True)):
        with pytest.raises(OSError, match="earlier flush") as caught:
            again()
        assert caught.value.errno == errno.ENOSPC
    disk.writev([memoryview(b"v" * 512)], 0)
    disk.close()
    assert len(reports) == 1
    assert "lost" in reports[0]
    assert content(reopened(data)) == b"b" * (8 * BLOCK)


def test_a_durable_write_in_place_is_one_durable_write() -> None:
    disk, data, _ = memory_overlay("flush 3+: EIO\nwrite 4: EIO")
    disk.writev([memoryview(b"1" * 512)], 0, durable=True)  # block, flush, bit, flush
    disk.writev([memoryview(b"2" * 512)], 512, durable=True)  # in place
    assert content(reopened(data))[:1536] == b"1" * 512 + b"2" * 512 + b"b" * 512
    with pytest.raises(OSError, match="Input/output"):
        disk.writev([memoryview(b"3" * 512)], 512, durable=True)
    with pytest.raises(OSError, match="earlier flush"):
        disk.flush()


def test_a_write_that_fails_leaves_the_base_in_view() -> None:
    disk, _, _ = memory_overlay("write 1: torn 512 ENOSPC")
    with pytest.raises(OSError, match="No space"):
        disk.writev([memoryview(b"w" * BLOCK)], BLOCK)
    assert content(disk) == b"b" * (8 * BLOCK)
    disk.writev([memoryview(b"w" * 512)], BLOCK + 512)
    assert content(disk)[BLOCK : BLOCK + 1536] == b"b" * 512 + b"w" * 512 + b"b" * 512


def test_only_bits_that_change_are_written() -> None:
    disk, _, _ = memory_overlay("flush 4+: EIO")
    disk.writev([memoryview(b"1" * 512)], 0)
    disk.flush()  # two
    disk.writev([memoryview(b"2" * 512)], 0)
    disk.flush()  # one: the block is held already
    with pytest.raises(OSError, match="Input/output"):
        disk.flush()


def test_bad_input_122_killed_in_the_middle_of_writing(image: Path, tmp_path: Path) -> None:
    """What a flush acknowledged is in the overlay, at blocks new to it and in place."""
    script = (
        "import sys, os; from pyvmm.storage.open import DiskSource, open_backend\n"
        "source = DiskSource(location=sys.argv[1], snapshot=True, overlay=sys.argv[2])\n"
        "disk = open_backend(source, report=print)\n"
        "for n in range(1, 256):\n"
        "    disk.writev([memoryview(bytes([n]) * 512)], n % 64 * 512)\n"
        "    disk.flush(); os.write(1, bytes([n]))\n"
    )
    before = image.read_bytes()
    for kill_after in (1, 5, 40, 100):
        overlay = tmp_path / f"o{kill_after}"
        with subprocess.Popen(
            [sys.executable, "-c", script, str(image), str(overlay)], stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            acknowledged = other.stdout.read(kill_after)
            other.kill()
            last = (other.stdout.read() or acknowledged)[-1]
        with overlay_over(image, overlay) as disk:
            now = content(disk)[::512]
        expected = bytearray(before[::512])
        for number in range(1, last + 1):
            expected[number % 64] = number
        expected[(last + 1) % 64] = now[(last + 1) % 64]  # this one was under way
        assert now == expected


# The file


def test_base_that_changed_is_reported(image: Path, tmp_path: Path) -> None:
    with overlay_over(image, tmp_path / "o") as disk:
        disk.writev([memoryview(b"w" * 512)], 0)
    with image.open("r+b") as file:
        file.write(b"changed")
    reports: list[str] = []
    with overlay_over(image, tmp_path / "o", reports):
        assert len(reports) == 1
        assert "its base was changed" in reports[0]


def test_base_of_another_size_is_refused(image: Path, tmp_path: Path) -> None:
    with overlay_over(image, tmp_path / "o"):
        pass
    with image.open("ab") as file:
        file.write(bytes(512))
    assert "a base of 32768 bytes, and this one has 33280" in refused(image, tmp_path / "o")


def test_what_is_no_overlay_is_refused_and_left_alone(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "precious.img"
    other.write_bytes(b"data" * 1024)
    assert "no overlay" in refused(image, other)
    assert other.read_bytes() == b"data" * 1024
    other.write_bytes(b"note")
    assert "has 4 bytes" in refused(image, other)
    assert "Is a directory" in refused(image, tmp_path)
    assert "No such file" in refused(image, tmp_path / "none" / "o")


def test_the_base_cannot_be_its_own_overlay(image: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names the disk itself"):
        refused(image, image)
    (tmp_path / "other-name").hardlink_to(image)
    assert "locked" in refused(image, tmp_path / "other-name")


def test_an_empty_file_becomes_an_overlay(image: Path, tmp_path: Path) -> None:
    """What is left of a run that was cut off while making it."""
    (tmp_path / "o").touch()
    with overlay_over(image, tmp_path / "o") as disk:
        assert content(disk) == image.read_bytes()
    with (tmp_path / "o2").open("wb") as file:
        file.truncate(store_bytes(64 * 512))
    with overlay_over(image, tmp_path / "o2") as disk:
        assert content(disk) == image.read_bytes()


def test_one_run_at_a_time(image: Path, tmp_path: Path) -> None:
    with overlay_over(image, tmp_path / "o"), overlay_over(image, tmp_path / "o2"):
        source = DiskSource(location=str(image), snapshot=True, overlay=str(tmp_path / "o"))
        with pytest.raises(ConfigError, match="locked"):
            open_backend(source, report=print)


@pytest.mark.parametrize(("offset", "value", "problem"), [
    (8, b"\2", "version 2"), (12, b"\1", "does not fit"), (24, b"\1", "does not fit"),
    (16, bytes(8), "a base of 0 bytes"),
])
def test_header_that_does_not_fit_is_refused(
    image: Path, tmp_path: Path, offset: int, value: bytes, problem: str
) -> None:
    with overlay_over(image, tmp_path / "o"):
        pass
    with (tmp_path / "o").open("r+b") as file:
        header = bytearray(file.read(512))
        header[offset : offset + len(value)] = value
        file.seek(0)
        file.write(header)
        file.flush()
        assert "checksum" in refused(image, tmp_path / "o")
        file.seek(40)
        file.write(zlib.crc32(header[:40]).to_bytes(4, "little"))
    assert problem in refused(image, tmp_path / "o")


def test_file_that_was_cut_off_is_refused(image: Path, tmp_path: Path) -> None:
    with overlay_over(image, tmp_path / "o"):
        pass
    with (tmp_path / "o").open("r+b") as file:
        file.truncate(8192)
    assert "is cut off" in refused(image, tmp_path / "o")


def test_fault_21_an_overlay_that_holds_nothing_takes_any_base(tmp_path: Path) -> None:
    """A run that was killed before its guest wrote leaves one: no change of the base damages it."""
    base, store = tmp_path / "base", tmp_path / "store"
    base.write_bytes(bytes(1 << 20))
    source = DiskSource(location=str(base), snapshot=True, overlay=str(store))
    open_backend(source, report=print).close()
    lines: list[str] = []
    for stamp in (1, 2):
        os.utime(base, ns=(stamp, stamp))
        open_backend(source, report=lines.append).close()
    assert not lines
    with closing(open_backend(source, report=lines.append)) as disk:
        disk.writev([memoryview(bytes(512))], 1 << 19)
    assert not lines, "its stamp is now the base's"
    os.utime(base, ns=(3, 3))
    open_backend(source, report=lines.append).close()
    assert len(lines) == 1
    assert "its base was changed" in lines[0]
