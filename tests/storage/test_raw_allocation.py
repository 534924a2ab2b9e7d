"""RawBackend: holes, zeroes, durable writes, a size that changes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pyvmm.storage import files, raw
from pyvmm.storage.raw import RawBackend
from tests.support.raw_disks import opened, room

MIB = 1 << 20


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of 1 MiB of data."""
    path = tmp_path / "big.img"
    path.write_bytes(b"x" * MIB)
    with path.open("rb") as file:
        os.fsync(file)
    return path


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_discard_makes_a_hole(big: Path) -> None:
    before = allocated(big)
    with opened(big) as disk:
        disk.discard(MIB // 4, MIB // 2)
    assert allocated(big) <= before - MIB // 2
    assert big.stat().st_size == MIB
    assert big.read_bytes()[: MIB // 4] == b"x" * (MIB // 4)
    assert big.read_bytes()[MIB * 3 // 4 :] == b"x" * (MIB // 4)


def test_write_zeroes_keeps_the_room_unless_it_may_go(big: Path) -> None:
    before = allocated(big)
    with opened(big) as disk:
        disk.write_zeroes(512, MIB - 1024, unmap=False)
        assert big.read_bytes() == b"x" * 512 + bytes(MIB - 1024) + b"x" * 512
        assert allocated(big) >= before
        disk.write_zeroes(512, MIB - 1024, unmap=True)
        assert allocated(big) < before - MIB // 2
    assert big.read_bytes() == b"x" * 512 + bytes(MIB - 1024) + b"x" * 512


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_no_holes_can_be_made(
    big: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def cannot(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(raw, "fallocate", cannot)
    with opened(big) as disk:
        disk.discard(0, MIB)  # advice
        assert big.read_bytes() == b"x" * MIB
        disk.write_zeroes(512, MIB - 1024, unmap=True)
    assert big.read_bytes() == b"x" * 512 + bytes(MIB - 1024) + b"x" * 512


def test_an_error_of_fallocate_is_told(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(raw, "fallocate", full)
    with opened(big) as disk:
        for operation in (disk.discard, lambda o, n: disk.write_zeroes(o, n, unmap=False)):
            with pytest.raises(OSError, match="No space"):
                operation(0, 512)


def test_fallocate_tells_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.fallocate(fd, files.PUNCH_HOLE | files.KEEP_SIZE, 0, 512)
    os.close(fd)


def test_a_read_only_disk_changes_in_no_way(big: Path) -> None:
    with opened(big, read_only=True) as disk:
        assert not disk.can_discard
        assert not disk.can_write_zeroes
        changes: list[Callable[[], None]] = [
            lambda: disk.discard(0, 512),
            lambda: disk.write_zeroes(0, 512, unmap=True),
            lambda: disk.writev(room(512), 0, durable=True),
        ]
        for change in changes:
            with pytest.raises(OSError, match="Read-only"):
                change()
    assert big.read_bytes() == b"x" * MIB


def test_a_durable_write_asks_the_kernel_for_it(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, flags_seen = os.pwritev, []

    def pwritev_watched(
        fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0
    ) -> int:
        flags_seen.append(flags)
        return pwritev(fd, [buffers[0][:256]], offset, flags)  # short, to see the rest too

    monkeypatch.setattr(os, "pwritev", pwritev_watched)
    with opened(big) as disk:
        disk.writev([memoryview(b"d" * 512)], 512, durable=True)
        assert flags_seen == [os.RWF_DSYNC] * 2
        disk.writev([memoryview(b"d" * 512)], 1024)
        assert set(flags_seen[2:]) == {0}  # a short one may be begun again
    assert big.read_bytes()[: 3 * 512] == b"x" * 512 + b"d" * 1024


def test_a_durable_write_that_fails_is_latched(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(big) as disk:
        monkeypatch.setattr(os, "pwritev", fail)
        with pytest.raises(OSError, match="Input/output"):
            disk.writev(room(512), 0)
        disk.flush()  # an ordinary write that fails is told and forgotten
        with pytest.raises(OSError, match="Input/output"):
            disk.writev(room(512), 0, durable=True)
        monkeypatch.undo()
        for again in (disk.flush, lambda: disk.writev(room(512), 0, durable=True)):
            with pytest.raises(OSError, match="earlier flush") as caught:
                again()
            assert caught.value.errno == errno.EIO
        disk.writev([memoryview(b"v" * 512)], 0)  # a volatile one promises nothing
    assert big.read_bytes()[:512] == b"v" * 512


def test_a_flush_that_fails_makes_durable_writes_fail(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", fail)
    with opened(big) as disk:
        with pytest.raises(OSError, match="No space"):
            disk.flush()
        with pytest.raises(OSError, match="earlier flush"):
            disk.writev(room(512), 0, durable=True)


def test_a_file_that_grows(image: Path) -> None:
    reports: list[str] = []
    disk = RawBackend(str(image), report=reports.append)
    os.truncate(image, 100 * 512 + 7)
    assert disk.size_bytes == 64 * 512  # until somebody asks
    assert disk.refresh_size() == disk.size_bytes == 100 * 512
    assert "last 7 bytes" in reports[0]
    disk.writev([memoryview(b"n" * 512)], 99 * 512)
    assert disk.refresh_size() == 100 * 512
    assert len(reports) == 1
    disk.close()
    assert image.stat().st_size == 100 * 512 + 7


def test_a_file_that_shrinks(backend: RawBackend, image: Path) -> None:
    os.truncate(image, 10 * 512)
    assert backend.refresh_size() == 10 * 512
    with pytest.raises(OSError, match="leave the disk"):
        backend.writev(room(512), 10 * 512)
    assert image.stat().st_size == 10 * 512


def test_a_block_device_tells_its_block_size(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with blocks of 4 KiB, as far as the calls go that ask for it."""

    def ioctl(fd: int, request: int, argument: bytearray) -> int:
        assert request == 0x1268
        argument[:] = (4096).to_bytes(4, "little")
        return 0

    monkeypatch.setattr("stat.S_ISBLK", lambda mode: True)
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    with opened(image) as disk:
        assert disk.block_size == 4096
