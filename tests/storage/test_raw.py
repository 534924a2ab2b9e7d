"""RawBackend: opening, transfers, durability, locks; bad inputs 113-122."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.raw import RawBackend
from tests.support.rig import Rig, make_rig

OK, IOERR = 0, 1
IN, OUT, FLUSH = 0, 1, 4


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file of 64 sectors; sector i is filled with i."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([i]) * 512 for i in range(64)))
    return path


@contextmanager
def opened(path: Path, *, read_only: bool = False) -> Iterator[RawBackend]:
    """A backend over ``path`` that reports to nobody."""
    backend = RawBackend(str(path), read_only=read_only, report=lambda line: None)
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture
def backend(image: Path) -> Iterator[RawBackend]:
    with opened(image) as backend:
        yield backend


@pytest.fixture
def rig(image: Path) -> Iterator[Rig]:
    """The guest's view of the image: a device in front of a RawBackend, running."""
    rig = make_rig(image)
    rig.driver.start()
    yield rig
    rig.transport.close()
    rig.backend.close()


def refusal(path: Path | str, *, read_only: bool = False) -> str:
    """The ConfigError that opening ``path`` gives."""
    with pytest.raises(ConfigError) as caught:
        RawBackend(str(path), read_only=read_only, report=lambda line: None)
    assert caught.value.subject == str(path)
    assert "\n" not in str(caught.value)
    return caught.value.problem


def room(*lengths: int) -> list[memoryview]:
    return [memoryview(bytearray(length)) for length in lengths]


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
        assert "cannot be opened" in refusal(tmp_path / "socket")


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


# Host faults

Transfer = Callable[[int, Sequence[memoryview], int], int]


def one_byte_at_a_time(call: Transfer) -> Transfer:
    """``call``, but it transfers only a byte each time, as a kernel may."""
    return lambda fd, buffers, offset: call(fd, [buffers[0][:1]], offset)


def test_bad_input_113_short_pread(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", one_byte_at_a_time(os.preadv))
    assert rig.driver.request(IN, 9, room=1024) == (OK, 1025, b"\x09" * 512 + b"\x0a" * 512)


def test_bad_input_114_short_pwrite_is_continued(
    rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", one_byte_at_a_time(os.pwritev))
    data = os.urandom(512)
    assert rig.driver.request(OUT, 9, data=data) == (OK, 1, b"")
    assert image.read_bytes()[9 * 512 : 10 * 512] == data


def test_bad_input_114_short_pwrite_then_enospc(
    rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, calls = os.pwritev, iter(range(2))

    def full(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwritev(fd, [buffers[0][:100]], offset)

    before = image.read_bytes()
    monkeypatch.setattr(os, "pwritev", full)
    assert rig.driver.request(OUT, 9, data=b"x" * 512) == (IOERR, 1, b"")
    monkeypatch.undo()
    after = image.read_bytes()
    assert after[: 9 * 512] == before[: 9 * 512]
    assert after[9 * 512 + 100 :] == before[9 * 512 + 100 :]
    assert rig.driver.request(OUT, 9, data=b"y" * 512).status == OK


@contextmanager
def file_size_limit(length: int) -> Iterator[None]:
    """A real write error: the kernel lets this process write no byte behind ``length``."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_bad_input_115_error_of_the_host_kernel(rig: Rig) -> None:
    before = rig.disk
    with file_size_limit(10 * 512):
        assert rig.driver.request(OUT, 10, data=b"x" * 512) == (IOERR, 1, b"")
        assert rig.disk == before
        assert rig.driver.request(OUT, 9, data=b"x" * 512) == (OK, 1, b"")


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_bad_input_115_eio(rig: Rig, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    if call == "preadv":
        assert rig.driver.request(IN, room=512) == (IOERR, 1, bytes(512))
    else:
        assert rig.driver.request(OUT, data=bytes(512)) == (IOERR, 1, b"")
    monkeypatch.undo()
    assert rig.driver.request(IN, 5, room=512) == (OK, 513, b"\5" * 512)


def test_bad_input_116_interrupted_system_calls(rig: Rig) -> None:
    signals = 0

    def count(*_: object) -> None:
        nonlocal signals
        signals += 1

    handler = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        rounds = 0
        while signals < 50:
            data = struct.pack("<I", rounds) * 1024
            assert rig.driver.request(OUT, 8, data=data).status == OK
            assert rig.driver.request(FLUSH).status == OK
            assert rig.driver.request(IN, 8, room=4096).data == data
            rounds += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_bad_input_117_flush_error_is_latched(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def fail(fd: int) -> None:
        raise OSError(error, os.strerror(error))

    assert rig.driver.request(FLUSH).status == OK
    monkeypatch.setattr(os, "fdatasync", fail)
    assert rig.driver.request(FLUSH) == (IOERR, 1, b"")
    monkeypatch.undo()  # the next fdatasync would say all is well
    for _ in range(3):
        assert rig.driver.request(FLUSH) == (IOERR, 1, b"")
    rig.driver.start()  # nor does a reset bring lost data back
    assert rig.driver.request(FLUSH) == (IOERR, 1, b"")
    with pytest.raises(OSError, match="earlier flush") as caught:
        rig.backend.flush()
    assert caught.value.errno == error
    assert rig.driver.request(IN, 5, room=512).status == OK


def test_bad_input_119_locked_by_another_writer(image: Path) -> None:
    with opened(image):
        assert "locked" in refusal(image)
        assert "locked" in refusal(image, read_only=True)
    with opened(image):
        pass


def test_bad_input_119_readers_share_and_keep_a_writer_out(image: Path) -> None:
    with opened(image, read_only=True), opened(image, read_only=True):
        assert ",ro" in refusal(image)


def test_bad_input_119_locked_by_another_process(image: Path) -> None:
    script = (
        "import sys; from pyvmm.storage.raw import RawBackend\n"
        "disk = RawBackend(sys.argv[1], report=print)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert "in use" in refusal(image)
        other.kill()
    with opened(image):
        pass  # a killed process holds no lock


def test_file_system_without_locks_is_reported(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.fcntl", no_locks)
    reports: list[str] = []
    RawBackend(str(image), report=reports.append).close()
    assert "no locks" in reports[0]


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_bad_input_120_file_that_cannot_be_written(
    image: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    real_open = os.open

    def no_writing(path: str, flags: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(error, os.strerror(error), path)
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", no_writing)
    assert ",ro" in refusal(image)
    with opened(image, read_only=True) as backend:
        buffers = room(512)
        backend.readv(buffers, 512)
        assert buffers[0] == b"\1" * 512


def test_file_that_cannot_even_be_read(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_goes(path: str, flags: int) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", nothing_goes)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "permission denied" in refusal(image)
    assert "Permission denied" in refusal(image, read_only=True)


def test_bad_input_122_killed_in_the_middle_of_writing(image: Path) -> None:
    script = (
        "import sys, os; from pyvmm.storage.raw import RawBackend\n"
        "disk = RawBackend(sys.argv[1], report=print)\n"
        "n = 0\n"
        "while True:\n"
        "    n = n % 250 + 1\n"
        "    disk.writev([memoryview(bytes([n]) * 512)] * 8, 8 * 512)\n"
        "    disk.flush(); os.write(1, bytes([n]))\n"
    )
    for sig in (signal.SIGTERM, signal.SIGKILL):
        before = image.read_bytes()
        with subprocess.Popen(
            [sys.executable, "-c", script, str(image)], stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            acknowledged = other.stdout.read(20)[-1]
            other.send_signal(sig)
            acknowledged = (other.stdout.read() or bytes([acknowledged]))[-1]
        after = image.read_bytes()
        assert len(after) == len(before)
        assert after[: 8 * 512] == before[: 8 * 512]
        assert after[16 * 512 :] == before[16 * 512 :]
        # What was acknowledged is there, or the write that was under way after it.
        assert set(after[8 * 512 : 16 * 512]) <= {acknowledged, acknowledged % 250 + 1}
        with opened(image):
            pass
