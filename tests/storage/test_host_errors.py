"""What the host refuses a disk is said to the person there: once for each operation and error."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.driver.vhost_user import VhostUserTransport
from pyvmm.storage.backend import BlockBackend, OutsideError
from pyvmm.storage.nbd import NbdBackend
from pyvmm.storage.open import DiskSource, open_backend
from pyvmm.storage.raw import RawBackend
from tests.support.driver_client import Client
from tests.support.export_process import Export
from tests.support.nbd_servers import agree, read_exactly, reply, request, scripted

SECTOR = 512
OPERATIONS: dict[str, tuple[str, str, Callable[[BlockBackend], None]]] = {
    "read": ("preadv", "a read", lambda disk: disk.readv([memoryview(bytearray(SECTOR))], 0)),
    "readv": ("preadv", "a read",
              lambda disk: disk.readv([memoryview(bytearray(SECTOR)) for _ in range(2)], 0)),
    "write": ("pwritev", "a write", lambda disk: disk.writev([memoryview(bytes(SECTOR))], 0)),
    "writev": ("pwritev", "a write",
               lambda disk: disk.writev([memoryview(bytes(SECTOR)) for _ in range(2)], 0)),
    "durable": ("pwritev", "a write",
                lambda disk: disk.writev([memoryview(bytes(SECTOR))], 0, durable=True)),
    "flush": ("fdatasync", "a flush", lambda disk: disk.flush()),
    "discard": ("fallocate", "a discard", lambda disk: disk.discard(0, SECTOR)),
    "zero": ("fallocate", "zeroing",
             lambda disk: disk.write_zeroes(0, SECTOR, unmap=False)),
}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ENODEV)


def failing(number: int) -> Callable[..., int]:
    """A system call that answers ``number``."""
    def call(*_arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * SECTOR))
    return path


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize(("call", "said", "operate"), OPERATIONS.values(), ids=OPERATIONS)
def test_fault_11_a_files_error_is_said_once(
    image: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, said: str,
    operate: Callable[[BlockBackend], None],
) -> None:
    if call == "fallocate" and number == errno.ENODEV:
        number = errno.EFBIG  # the other means that the file cannot do it, and zeroes are written
    reports: list[str] = []
    disk = RawBackend(str(image), report=reports.append)
    place = "pyvmm.storage.raw.fallocate" if call == "fallocate" else f"os.{call}"
    monkeypatch.setattr(place, failing(number))
    for _ in range(3):
        with pytest.raises(OSError, match=r".") as caught:
            operate(disk)
        assert caught.value.errno == number
    assert reports == [
        f"{image}: {said} failed: {os.strerror(number)}; the guest gets I/O errors (said once)"
    ]
    monkeypatch.undo()
    disk.close()


def test_fault_11_each_kind_is_said(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    disk = RawBackend(str(image), report=reports.append)
    for number in (errno.ENOSPC, errno.EIO) * 2:
        for call in ("preadv", "pwritev"):
            monkeypatch.setattr(os, call, failing(number))
        for name in ("read", "write"):
            with pytest.raises(OSError, match=r"."):
                OPERATIONS[name][2](disk)
    assert len(reports) == len(set(reports)) == 4
    monkeypatch.undo()
    disk.close()


def test_what_lies_outside_the_disk_is_no_error_of_the_host(image: Path) -> None:
    reports: list[str] = []
    disk = RawBackend(str(image), report=reports.append)
    with pytest.raises(OutsideError):
        disk.readv([memoryview(bytearray(SECTOR))], 64 * SECTOR)
    with pytest.raises(OutsideError):
        disk.writev([memoryview(bytes(SECTOR))], -SECTOR)
    disk.close()
    disk = RawBackend(str(image), read_only=True, report=reports.append)
    with pytest.raises(OSError, match="Read-only"):
        disk.writev([memoryview(bytes(SECTOR))], 0)
    disk.close()
    assert reports == []


def test_fault_11_a_file_that_became_shorter(image: Path) -> None:
    reports: list[str] = []
    disk = RawBackend(str(image), report=reports.append)
    os.truncate(image, SECTOR)
    for _ in range(3):
        with pytest.raises(OSError, match="shorter"):
            disk.readv([memoryview(bytearray(SECTOR))], 8 * SECTOR)
    disk.close()
    assert len(reports) == 1
    assert reports[0].startswith(f"{image}: a read failed: the file has become shorter; ")


def test_fault_11_a_bad_disk_is_said_after_a_file_became_shorter(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are EIO to the guest, and two things to mend."""
    reports: list[str] = []
    disk = RawBackend(str(image), report=reports.append)
    os.truncate(image, SECTOR)
    for _ in range(2):
        with pytest.raises(OSError, match="shorter"):
            disk.readv([memoryview(bytearray(SECTOR))], 8 * SECTOR)
        with pytest.raises(OSError, match="shorter"):
            disk.writev([memoryview(bytes(SECTOR))], 8 * SECTOR)
    for call in ("preadv", "pwritev"):
        monkeypatch.setattr(os, call, failing(errno.EIO))
    for _ in range(2):
        for name in ("read", "write"):
            with pytest.raises(OSError, match="Input/output"):
                OPERATIONS[name][2](disk)
    monkeypatch.undo()
    disk.close()
    assert [line.removeprefix(f"{image}: ").partition(";")[0] for line in reports] == [
        "a read failed: the file has become shorter",
        "a write failed: the file has become shorter",
        "a read failed: Input/output error",
        "a write failed: Input/output error",
    ]


@pytest.mark.parametrize("name", ["write", "writev", "durable", "discard", "zero"])
def test_fault_11_beyond_a_new_end_the_operation_is_named(image: Path, name: str) -> None:
    reports: list[str] = []
    disk = RawBackend(str(image), report=reports.append)
    os.truncate(image, 0)
    for _ in range(2):
        with pytest.raises(OSError, match="shorter"):
            OPERATIONS[name][2](disk)
    disk.close()
    said = OPERATIONS[name][1]
    assert [line.partition(";")[0] for line in reports] == [
        f"{image}: {said} failed: the file has become shorter"
    ]
    assert image.stat().st_size == 0


@pytest.mark.parametrize("keep", [True, False])
def test_fault_11_an_overlays_file_is_named_not_its_base(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    reports: list[str] = []
    overlay = str(tmp_path / "kept") if keep else ""
    unnamed = f"{tmp_path} (a snapshot's writes go there; TMPDIR names another): a write failed: "
    disk = open_backend(
        DiskSource(location=str(image), snapshot=True, overlay=overlay), report=reports.append
    )
    monkeypatch.setattr(os, "pwritev", failing(errno.ENOSPC))
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            disk.writev([memoryview(bytes(SECTOR))], 0)
    monkeypatch.undo()
    assert len(reports) == 1
    # A file without a name cannot be looked at: its directory is what is full.
    assert reports[0].startswith(f"{overlay}: a write failed: " if keep else unnamed)
    assert "a write failed: No space left on device" in reports[0]
    disk.close()


def test_fault_11_an_nbd_servers_error(tmp_path: Path) -> None:
    def serve(connection: socket.socket) -> None:
        agree(connection)
        while True:
            _, command, cookie, _, length = request(connection)
            if command == 2:
                return
            read_exactly(connection, length if command == 1 else 0)
            connection.sendall(reply(cookie, errno.ENOSPC))

    reports: list[str] = []
    uri = f"nbd+unix:///?socket={tmp_path}/sock"
    with scripted(tmp_path / "sock", serve):
        disk = NbdBackend(uri, report=reports.append)
        for _ in range(3):
            with pytest.raises(OSError, match="No space"):
                OPERATIONS["write"][2](disk)
        with pytest.raises(OSError, match="No space"):
            disk.flush()
        disk.close()
    ending = "failed: No space left on device; the guest gets I/O errors (said once)"
    assert reports == [f"{uri}: a write {ending}", f"{uri}: a flush {ending}"]


@pytest.mark.parametrize("options", ["", ",snapshot", ",writeback=off"])
def test_fault_11_an_export_says_it_with_the_files_name(
    tmp_path: Path, image: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room, of the kind that a test can have without being root: a limit of the file's size."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Export(f"{image}{options}", tmp_path / "s") as export:
        resource.prlimit(export.process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        with Client(VhostUserTransport(str(tmp_path / "s"))) as client:
            buffers = [client.buffer(number, 8192) for number in range(40)]
            for number, buffer in enumerate(buffers):
                client.queue.write(8192 * (number % 2 + 1), buffer, number)
            assert set(client.rets(len(buffers)).values()) == {-errno.EIO}
        export.wait_for("a write failed: File too large; the guest gets I/O errors (said once)")
        assert export.messages.count("failed") == 1
        unnamed = f"{tmp_path} (a snapshot's writes go there; TMPDIR"
        named = unnamed if options == ",snapshot" else str(image)
        assert named in export.messages
        export.stop()
