"""NbdBackend against real servers: what they offer, how they fail, what happens when they die."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.nbd import NbdBackend
from tests.support.nbd_servers import nbdkit, nbdkit_tcp, qemu_nbd
from tests.support.patience import patient
from tests.support.raw_disks import room
from tests.support.rig import make_rig

OK, IOERR = 0, 1
IN, OUT, FLUSH = 0, 1, 4


@contextmanager
def connected(
    uri: str, *, read_only: bool = False, reports: list[str] | None = None, timeout_s: float = 10
) -> Iterator[NbdBackend]:
    lines: list[str] = [] if reports is None else reports
    disk = NbdBackend(uri, read_only=read_only, report=lines.append, timeout_s=timeout_s)
    with closing(disk):
        yield disk
    if reports is None:
        assert lines == []


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def uri(sock: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={sock}"


def refusal(address: str, *, read_only: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        NbdBackend(address, read_only=read_only, report=print, timeout_s=patient(5))
    assert caught.value.subject == address
    assert "\n" not in str(caught.value)
    return caught.value.problem


def read(disk: NbdBackend, offset: int, length: int) -> bytes:
    buffers = room(length)
    disk.readv(buffers, offset)
    return bytes(buffers[0])


def test_tcp(image: Path) -> None:
    with nbdkit_tcp("file", str(image)) as port, connected(f"nbd://127.0.0.1:{port}") as disk:
        assert read(disk, 7 * 512, 512) == b"\7" * 512
        disk.writev([memoryview(b"t" * 512)], 0, durable=True)
        assert image.read_bytes()[:512] == b"t" * 512


def test_what_is_written_is_in_the_servers_file(image: Path, sock: Path) -> None:
    with qemu_nbd(sock, image), connected(uri(sock, "disk")) as disk:
        disk.writev([memoryview(b"w" * 512)], 512)
        disk.flush()
        assert image.read_bytes()[512:1024] == b"w" * 512


@pytest.mark.parametrize("unmap", [False, True])
def test_discard_and_zeroes_make_holes_at_the_server(
    tmp_path: Path, sock: Path, unmap: bool
) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"x" * (1 << 20))
    with path.open("rb") as file:
        os.fsync(file)
    before = path.stat().st_blocks
    with nbdkit(sock, "file", str(path)), connected(uri(sock)) as disk:
        assert disk.can_discard
        assert disk.can_write_zeroes
        disk.write_zeroes(0, 1 << 19, unmap=unmap)
        disk.discard(3 << 18, 1 << 18)
        disk.flush()
    less = before - path.stat().st_blocks
    assert less >= ((3 if unmap else 1) << 18) // 512
    assert unmap or less <= (1 << 18) // 512
    assert path.read_bytes()[: 3 << 18] == bytes(1 << 19) + b"x" * (1 << 18)


def test_a_server_that_cannot_discard_or_zero(image: Path, sock: Path) -> None:
    with (
        nbdkit(sock, "--filter=nozero", "file", str(image)),
        connected(uri(sock)) as disk,
    ):
        assert not disk.can_write_zeroes
        disk.write_zeroes(512, 1024, unmap=True)  # as data
        assert read(disk, 0, 2048) == bytes(1536) + b"\3" * 512
    command = ["eval", "get_size=echo 32768", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null"]
    reports: list[str] = []
    bare = sock.with_name("s3")
    with nbdkit(bare, *command), connected(uri(bare), reports=reports) as disk:
        assert not disk.can_discard
        assert "knows no flush" in reports[0]
        disk.discard(0, 512)
        disk.writev(room(512), 0, durable=True)
        disk.flush()
    assert len(reports) == 1


def test_a_server_without_fua_gets_a_flush(tmp_path: Path, sock: Path) -> None:
    log = tmp_path / "log"
    command = ["eval", "get_size=echo 32768", "pread=head -c $3 /dev/zero", "can_fua=echo none",
               "can_flush=exit 0", f"flush=echo flush >>{log}",
               f"pwrite=cat >/dev/null; echo write $4 >>{log}"]
    with nbdkit(sock, *command), connected(uri(sock)) as disk:
        disk.writev(room(512), 512, durable=True)
        disk.writev(room(512), 1024)
    assert log.read_text() == "write 512\nflush\nwrite 1024\n"


def test_durable_is_fua(tmp_path: Path, sock: Path) -> None:
    log = tmp_path / "log"
    with (
        nbdkit(sock, "--filter=log", "memory", "size=64K", f"logfile={log}"),
        connected(uri(sock)) as disk,
    ):
        disk.writev(room(512), 0, durable=True)
        disk.writev(room(512), 512)
    written = log.read_text()
    assert written.count("fua=1") == 1
    assert "Flush id=" not in written


def test_requests_keep_to_the_servers_sizes(sock: Path) -> None:
    limits = ("--filter=blocksize-policy", "memory", "size=1M", "blocksize-minimum=4096",
              "blocksize-maximum=65536", "blocksize-error-policy=error")
    reports: list[str] = []
    with nbdkit(sock, *limits), connected(uri(sock), reports=reports) as disk:
        assert disk.block_size == 4096
        data = os.urandom(1 << 20)
        disk.writev([memoryview(data)[:1000], memoryview(data)[1000:]], 0)
        assert read(disk, 0, 1 << 20) == data
        with pytest.raises(OSError, match="Invalid argument") as caught:
            disk.writev(room(512), 512)
        assert caught.value.errno == errno.EINVAL
        assert len(reports) == 1
        assert read(disk, 0, 4096) == data[:4096]  # an error is no lost connection


def test_a_server_that_wants_huge_blocks_is_refused(sock: Path) -> None:
    limits = ("--filter=blocksize-policy", "memory", "size=1M", "blocksize-minimum=65536",
              "blocksize-preferred=65536", "blocksize-error-policy=error")
    with nbdkit(sock, *limits):
        assert "blocks of 65536 bytes" in refusal(uri(sock))


def test_more_buffers_than_one_call_takes(sock: Path) -> None:
    with nbdkit(sock, "memory", "size=1M"), connected(uri(sock)) as disk:
        data = os.urandom((os.sysconf("SC_IOV_MAX") + 100) * 512)
        disk.writev([memoryview(data)[i : i + 512] for i in range(0, len(data), 512)], 0)
        buffers = room(*[512] * (len(data) // 512))
        disk.readv(buffers, 0)
        assert b"".join(buffers) == data


def test_read_only(image: Path, sock: Path) -> None:
    with nbdkit(sock, "-r", "file", str(image)):
        assert ",ro" in refusal(uri(sock))
        with connected(uri(sock), read_only=True) as disk:
            assert (disk.can_discard, disk.can_write_zeroes) == (False, False)
            assert read(disk, 512, 512) == b"\1" * 512
            changes: list[Callable[[], None]] = [
                lambda: disk.writev(room(512), 0),
                lambda: disk.discard(0, 512),
                lambda: disk.write_zeroes(0, 512, unmap=True),
            ]
            for change in changes:
                with pytest.raises(OSError, match="Read-only"):
                    change()


def test_unknown_export(image: Path, sock: Path) -> None:
    with qemu_nbd(sock, image):
        assert "no export 'nothing'" in refusal(uri(sock, "nothing"))


def test_an_export_too_small(sock: Path) -> None:
    with nbdkit(sock, "memory", "size=511"):
        assert "has 511 bytes" in refusal(uri(sock))


def test_a_size_that_is_no_multiple_of_the_sector(sock: Path) -> None:
    with nbdkit(sock, "memory", "size=1300"), connected(uri(sock)) as disk:
        assert disk.size_bytes == 1024


def test_nobody_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(uri(tmp_path / "none"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "refused" in refusal(f"nbd://127.0.0.1:{closed.getsockname()[1]}")
    assert "cannot be opened" in refusal("nbd://no-such-host.invalid/")


def test_a_server_that_only_listens(sock: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sock))
        listener.listen()
        with pytest.raises(ConfigError, match=r"has not agreed on a disk within 0\.2 s"):
            NbdBackend(uri(sock), report=print, timeout_s=0.2)


def test_errors_of_the_server_are_the_disks(sock: Path) -> None:
    faults = ("--filter=error", "memory", "size=64K", "error-pread=EIO", "error-pwrite=ENOSPC",
              "error-pread-rate=100%", "error-pwrite-rate=100%")
    reports: list[str] = []
    with nbdkit(sock, *faults), connected(uri(sock), reports=reports) as disk:
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                disk.readv(room(512), 0)
            with pytest.raises(OSError, match="No space"):
                disk.writev(room(512), 0)
        disk.flush()
    assert [line.partition(" failed: ")[0] for line in reports] == [
        f"{uri(sock)}: a read", f"{uri(sock)}: a write"
    ]


def test_a_failed_flush_is_latched(sock: Path) -> None:
    command = ["eval", "get_size=echo 32768", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null",
               "can_flush=exit 0", "flush=echo EIO >&2; exit 1"]
    reports: list[str] = []
    with nbdkit(sock, *command), connected(uri(sock), reports=reports) as disk:
        with pytest.raises(OSError, match="Input/output"):
            disk.writev(room(512), 0, durable=True)
        for again in (disk.flush, lambda: disk.writev(room(512), 0, durable=True)):
            with pytest.raises(OSError, match="earlier flush"):
                again()
        disk.writev(room(512), 0)
    assert len(reports) == 1


def test_the_guest_sees_a_killed_server_as_io_errors(image: Path, sock: Path) -> None:
    reports: list[str] = []
    with qemu_nbd(sock, image) as server, connected(uri(sock, "disk"), reports=reports) as disk:
        rig = make_rig(image, backend=disk)
        rig.driver.start()
        assert rig.driver.request(OUT, 3, data=b"w" * 512).status == OK
        assert rig.driver.request(IN, 3, room=512) == (OK, 513, b"w" * 512)
        server.send_signal(signal.SIGKILL)
        server.wait()
        started = time.monotonic()
        assert rig.driver.request(IN, 3, room=512).status == IOERR
        assert rig.driver.request(OUT, 3, data=b"x" * 512).status == IOERR
        assert rig.driver.request(FLUSH).status == IOERR
        assert time.monotonic() - started < patient(2)
        assert len(reports) == 1
        assert "connection lost" in reports[0]
        assert uri(sock, "disk") in reports[0]
        rig.transport.close()
    assert len(reports) == 1


def test_a_server_killed_in_the_middle_of_a_request(sock: Path) -> None:
    """It is killed by its own plug-in, with a request's data sent and no answer given."""
    command = ["eval", "get_size=echo 32768", "pread=head -c $3 /dev/zero",
               "pwrite=kill -9 $PPID"]
    reports: list[str] = []
    with (
        nbdkit(sock, "--filter=noparallel", *command, "serialize=connections"),
        connected(uri(sock), reports=reports) as disk,
    ):
        assert read(disk, 0, 512) == bytes(512)
        with pytest.raises(OSError, match="connection is lost") as caught:
            disk.writev(room(512), 0)
        assert caught.value.errno == errno.EIO
    assert len([line for line in reports if "connection lost" in line]) == 1


def test_a_server_that_stops_answering_is_given_up(image: Path, sock: Path) -> None:
    reports: list[str] = []
    with (
        qemu_nbd(sock, image) as server,
        connected(uri(sock, "disk"), reports=reports, timeout_s=0.3) as disk,
    ):
        server.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        for _ in range(3):
            with pytest.raises(OSError, match="connection is lost"):
                disk.readv(room(512), 0)
        assert 0.2 < time.monotonic() - started < patient(2)
        assert len(reports) == 1
        assert "timed out" in reports[0]
