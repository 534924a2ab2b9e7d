"""RawBackend: opening and refusing, transfers, the end of the file."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.raw import RawBackend
from tests.support.raw_disks import opened, refusal, room


def test_it_is_a_block_backend(backend: RawBackend) -> None:
    disk: BlockBackend = backend
    assert (disk.size_bytes, disk.read_only, disk.block_size) == (64 * 512, False, 512)


def test_scattered_read_and_write(backend: RawBackend, image: Path) -> None:
    buffers = room(100, 412, 512)
    backend.readv(buffers, 3 * 512)
    assert b"".join(buffers) == b"\3" * 512 + b"\4" * 512
    backend.writev([memoryview(b"a" * 7), memoryview(b"b" * 505)], 63 * 512)
    backend.flush()
    assert image.read_bytes()[63 * 512 :] == b"a" * 7 + b"b" * 505


def test_more_buffers_than_one_call_takes(backend: RawBackend, image: Path) -> None:
    count = os.sysconf("SC_IOV_MAX") + 100
    data = os.urandom(count * 4)
    backend.writev([memoryview(data)[i : i + 4] for i in range(0, len(data), 4)], 512)
    assert image.read_bytes()[512 : 512 + len(data)] == data
    buffers = room(*[4] * count)
    backend.readv(buffers, 512)
    assert b"".join(buffers) == data


@pytest.mark.parametrize("offset", [-512, 64 * 512 - 511, 64 * 512, 1 << 62])
def test_transfer_outside_the_disk_is_refused(
    backend: RawBackend, image: Path, offset: int
) -> None:
    before = image.read_bytes()
    for transfer in (backend.readv, backend.writev):
        with pytest.raises(OSError, match="leave the disk"):
            transfer(room(512), offset)
    assert image.read_bytes() == before


def test_tail_is_reported_and_never_touched(image: Path) -> None:
    with image.open("ab") as file:
        file.write(b"tail")
    reports: list[str] = []
    backend = RawBackend(str(image), report=reports.append)
    assert backend.size_bytes == 64 * 512
    assert len(reports) == 1
    assert str(image) in reports[0]
    assert "last 4 bytes" in reports[0]
    with pytest.raises(OSError, match="leave the disk"):
        backend.writev([memoryview(b"x" * 512)], 64 * 512)
    backend.close()
    assert image.read_bytes()[64 * 512 :] == b"tail"


def test_read_only_refuses_writes_and_flushes(image: Path) -> None:
    with opened(image, read_only=True) as backend:
        assert backend.read_only
        with pytest.raises(OSError, match="Read-only file system"):
            backend.writev([memoryview(b"x" * 512)], 0)
        backend.flush()


def test_file_that_becomes_shorter_is_eio(backend: RawBackend, image: Path) -> None:
    os.truncate(image, 512)
    with pytest.raises(OSError, match="shorter") as caught:
        backend.readv(room(1024), 0)
    assert caught.value.errno == errno.EIO


def test_close_can_be_repeated(image: Path) -> None:
    backend = RawBackend(str(image), report=print)
    backend.close()
    backend.close()
    with opened(image):
        pass  # close has unlocked it


# Refusals


def test_missing_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    assert "truncate" in refusal(tmp_path / "none.img")
    assert "truncate" in refusal(tmp_path / "none.img", read_only=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_directory_is_refused(tmp_path: Path, read_only: bool) -> None:
    assert "a directory, not a regular file" in refusal(tmp_path, read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True])
def test_fifo_is_refused_without_waiting_for_it(tmp_path: Path, read_only: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "a FIFO, not a regular file" in refusal(tmp_path / "fifo", read_only=read_only)


def test_character_device_and_socket_are_refused(tmp_path: Path) -> None:
    assert "a character device" in refusal("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "is a socket; the disk of a vhost-user back end" in refusal(tmp_path / "socket")


@pytest.mark.parametrize("length", [0, 1, 511])
def test_file_without_a_whole_sector_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "small.img"
    path.write_bytes(bytes(length))
    assert f"has {length} bytes" in refusal(path)


def test_name_with_a_nul_is_refused() -> None:
    with pytest.raises(ConfigError, match="no file name"):
        RawBackend("disk\0.img", report=print)


def test_symlink_to_a_file_is_fine(tmp_path: Path, image: Path) -> None:
    (tmp_path / "link").symlink_to(image)
    with opened(tmp_path / "link") as backend:
        assert backend.size_bytes == 64 * 512


def test_symlink_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert "no such file" in refusal(tmp_path / "link")


def test_file_that_cannot_even_be_read(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_goes(path: str, flags: int) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", nothing_goes)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "permission denied" in refusal(image)
    assert "Permission denied" in refusal(image, read_only=True)


def test_file_system_without_locks_is_reported(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.fcntl", no_locks)
    reports: list[str] = []
    RawBackend(str(image), report=reports.append).close()
    assert "no locks" in reports[0]
