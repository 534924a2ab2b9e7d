"""Host faults, mostly as the guest sees them: bad inputs 113-122."""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.raw_disks import opened, refusal, room
from tests.support.rig import Rig

OK, IOERR = 0, 1
IN, OUT, FLUSH = 0, 1, 4

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


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_fault_10_a_truncated_image_never_grows_again(
    image: Path, durable: bool, pieces: int
) -> None:
    """What it has lost is an error to the guest, never zeros."""
    with opened(image) as disk:
        data = [memoryview(b"w" * 512)] * pieces
        os.truncate(image, 9 * 512)
        for offset in (9 * 512, 20 * 512, 64 * 512 - 512 * pieces):
            with pytest.raises(OSError, match="has become shorter") as caught:
                disk.writev(data, offset, durable=durable)
            assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="has become shorter"):
            disk.write_zeroes(20 * 512, 512, unmap=False)
        with pytest.raises(OSError, match="has become shorter"):
            disk.readv(room(512), 20 * 512)
        assert image.stat().st_size == 9 * 512
        disk.writev(data, (9 - pieces) * 512, durable=durable)  # the rest is as good as ever
        assert image.read_bytes()[-512 * pieces :] == b"w" * 512 * pieces
        disk.flush()


def test_fault_10_the_guest_of_a_truncated_image(rig: Rig, image: Path) -> None:
    assert rig.driver.request(OUT, 20, data=b"a" * 512) == (OK, 1, b"")
    os.truncate(image, 9 * 512)
    assert rig.driver.request(OUT, 20, data=b"b" * 512)[0] == IOERR
    assert rig.driver.request(IN, 20, room=512)[0] == IOERR
    assert image.stat().st_size == 9 * 512
    os.truncate(image, 64 * 512)  # whoever did it has put it back
    assert rig.driver.request(OUT, 20, data=b"c" * 512) == (OK, 1, b"")
