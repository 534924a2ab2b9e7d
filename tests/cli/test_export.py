"""``pyvmm export`` as a user meets it: ready, served, ended; and what it refuses."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli.main import main
from pyvmm.vhost_user.protocol import (
    CONFIG,
    U64,
    VERSION,
    BackendRequest,
    ProtocolFeature,
    Request,
)
from tests.support.export_process import Export
from tests.support.patience import patient

PROTOCOL = int(ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * 512))
    return path


class Caller:
    """A front end of a few messages."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(patient(10))
        self.socket.connect(str(path))

    def send(self, request: int, payload: bytes = b"", fds: list[int] | None = None) -> None:
        data = struct.pack("=III", request, VERSION, len(payload)) + payload
        socket.send_fds(self.socket, [data], fds or [])

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.send(request, payload)
        _, _, size = struct.unpack("=III", self.socket.recv(12, socket.MSG_WAITALL))
        return self.socket.recv(size, socket.MSG_WAITALL)

    def capacity_sectors(self) -> int:
        """Needs CONFIG."""
        space = self.ask(Request.GET_CONFIG, CONFIG.pack(0, 8, 0) + bytes(8))
        return int(struct.unpack_from("<Q", space, CONFIG.size)[0])

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_disk_is_served_until_a_signal(tmp_path: Path, disk: Path, number: int) -> None:
    path = tmp_path / "s"
    with Export(f"{disk},queues=3", path) as export, Caller(path) as caller:
        assert U64.unpack(caller.ask(Request.GET_QUEUE_NUM))[0] == 3
        export.process.send_signal(number)
        assert export.process.wait(patient(30)) == 0
        assert caller.socket.recv(1) == b""
        assert not path.exists()
        assert export.messages == f"pyvmm: {disk} is served at {path}\n"


def test_there_is_room_for_what_many_front_ends_share(tmp_path: Path, disk: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with Export(disk, tmp_path / "s") as export:
            assert resource.prlimit(export.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_another_signal_is_its_exit_status(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "s"
    with Export(disk, path) as export:
        export.process.send_signal(signal.SIGHUP)
        assert export.process.wait(patient(30)) == 128 + signal.SIGHUP
    assert not path.exists()


def test_verbose_says_who_comes_and_goes(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "s"
    with Export(disk, path, "-v") as export:
        with Caller(path) as caller:
            caller.ask(Request.GET_FEATURES)
        export.wait_for("hung up")
        assert f"{path}: front end (pid {os.getpid()}) connected\n" in export.messages
        export.stop()


def test_a_disk_that_grows(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "s"
    with Export(disk, path) as export, Caller(path) as caller:
        caller.send(Request.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL))
        ours, theirs = socket.socketpair()
        caller.send(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.close()
        assert caller.capacity_sectors() == 64
        os.truncate(disk, 1 << 20)
        export.process.send_signal(signal.SIGUSR1)
        ours.settimeout(patient(10))
        assert ours.recv(100) == struct.pack("=III", BackendRequest.CONFIG_CHANGE_MSG, VERSION, 0)
        assert caller.capacity_sectors() == 2048
        assert f"{disk}: 32768 bytes before, 1048576 bytes now\n" in export.messages
        ours.close()
        assert export.stop() == 0


def test_a_killed_export_leaves_a_socket_that_the_next_one_replaces(
    tmp_path: Path, disk: Path
) -> None:
    path = tmp_path / "s"
    with Export(disk, path) as export:
        export.kill()
    assert path.exists()
    with Export(disk, path) as export, Caller(path) as caller:
        caller.ask(Request.GET_FEATURES)
        assert export.stop() == 0


def refusal(capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    """The one line with which ``pyvmm export`` refuses ``options``."""
    open_before = sorted(os.listdir("/proc/self/fd"))
    assert main(["export", *map(str, options)]) == 125
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pyvmm: ")
    assert captured.err.count("\n") == 1, captured.err
    assert sorted(os.listdir("/proc/self/fd")) == open_before, "a descriptor was left open"
    return captured.err


def test_missing_options(capsys: pytest.CaptureFixture[str], disk: Path) -> None:
    assert "--disk" in refusal(capsys, "--socket", "s")
    assert "--socket" in refusal(capsys, "--disk", disk)
    assert "pyvmm export --help" in refusal(capsys, "--disk", disk, "--sockets", "s")


def test_an_option_given_twice(capsys: pytest.CaptureFixture[str], disk: Path) -> None:
    line = refusal(capsys, "--disk", disk, "--disk", disk, "--socket", "s")
    assert "--disk: is given twice; start one export for each disk" in line
    line = refusal(capsys, "--disk", disk, "--socket", "s", "--socket", "t")
    assert "--socket: is given twice" in line


def test_a_disk_that_is_a_socket(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        line = refusal(capsys, "--disk", path, "--socket", tmp_path / "s")
    assert f"{path}: is a socket; the disk of" in line
    assert f"--disk vhost-user={path}" in line


def test_a_socket_in_the_lab_belongs_into_tmp(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    disk: Path,
) -> None:
    nowhere = tmp_path / "none" / "s"
    assert "in the lab" not in refusal(capsys, "--disk", f"{disk},ro", "--socket", nowhere)
    monkeypatch.setenv("PYVMM_LAB", "1")
    line = refusal(capsys, "--disk", f"{disk},ro", "--socket", nowhere)
    assert "(in the lab: sockets work under /tmp alone" in line


def test_the_same_complaint_is_not_made_every_second(tmp_path: Path, disk: Path) -> None:
    path = tmp_path / "s"
    with Export(disk, path) as export:
        for _ in range(3):
            with Caller(path) as caller:
                caller.send(Request.SET_LOG_FD)
                assert caller.socket.recv(1) == b""
        with Caller(path) as caller:
            caller.send(Request.SEND_RARP)
            export.wait_for("SEND_RARP")
        export.stop()
        assert export.messages.count("SET_LOG_FD") == 1


def test_a_disk_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refusal(capsys, "--disk", tmp_path / "none", "--socket", tmp_path / "s")
    assert str(tmp_path / "none") in line
    assert not (tmp_path / "s").exists()


def test_a_disk_option_that_is_unknown(capsys: pytest.CaptureFixture[str], disk: Path) -> None:
    assert "does not know 'rw'" in refusal(capsys, "--disk", f"{disk},rw", "--socket", "s")


def test_a_disk_that_is_served_already(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "--disk", "vhost-user=x", "--socket", "s")
    assert "vhost-user=x: is served already" in line


def test_a_socket_in_use(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, disk: Path
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "is in use" in refusal(capsys, "--disk", f"{disk},ro", "--socket", path)
    assert path.exists()


def test_a_file_in_the_place_of_the_socket(
    capsys: pytest.CaptureFixture[str], disk: Path
) -> None:
    assert "is no socket" in refusal(capsys, "--disk", f"{disk},ro", "--socket", disk)
    assert disk.stat().st_size == 64 * 512


def test_help_has_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "export", "--help"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""
    assert "pyvmm export --disk root.img --socket" in done.stdout
    assert "memory-backend-memfd" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("path", ["/none/x", "x" * 200, "."])
def test_fault_21_a_socket_that_cannot_be_leaves_no_overlay(
    capsys: pytest.CaptureFixture[str], disk: Path, path: str
) -> None:
    new = disk.with_name("new.overlay")
    assert main(["export", "--disk", f"{disk},overlay={new}", "--socket", path]) == 125
    assert "socket" in capsys.readouterr().err
    assert not new.exists()


def test_fault_21_an_export_that_was_served_keeps_its_overlay(disk: Path) -> None:
    new = disk.with_name("new.overlay")
    with Export(f"{disk},overlay={new}", disk.with_name("s")) as export:
        assert export.stop() == 0
    assert new.exists()


def limited(limit: int, *args: str | Path) -> subprocess.Popen[str]:
    """``pyvmm ARGS`` that may have ``limit`` open files, and can never have more."""
    return subprocess.Popen(
        [sys.executable, "-m", "pyvmm", *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit)),
    )  # fmt: skip


@pytest.mark.parametrize("limit", [6, 8, 9])
def test_fault_25_how_many_open_files_an_export_needs_is_said(
    tmp_path: Path, disk: Path, limit: int
) -> None:
    path = tmp_path / "s"
    with limited(limit, "export", "--disk", disk, "--socket", path) as export:
        said, _ = export.communicate(timeout=patient(30))
    assert export.returncode == 125
    assert re.fullmatch(
        rf"pyvmm: too few open files: the limit is {limit}, this export needs (\d+); "
        r"raise it with `ulimit -n \1`\n", said,
    ), said
    assert not path.exists(), "a socket that nobody listens on"


def test_fault_25_an_export_without_room_for_a_front_end_says_so(
    tmp_path: Path, disk: Path
) -> None:
    path = tmp_path / "s"
    with limited(13, "export", "--disk", disk, "--socket", path) as export:
        assert export.stdout
        line = export.stdout.readline()
        export.terminate()
        rest = export.stdout.read()
    assert re.fullmatch(
        r"pyvmm: too few open files: the limit is 13, .* needs (\d+); .*`ulimit -n \1`\n", line
    ), line
    assert rest == f"pyvmm: {disk} is served at {path}\n"


def test_fault_25_no_front_end_ends_an_export_that_is_short_of_open_files(
    tmp_path: Path, disk: Path
) -> None:
    path = tmp_path / "s"
    with Export(disk, path) as export:
        pid = export.process.pid
        usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        for more in range(4):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + more, usual[1]))
            said = len(export.messages)
            with Caller(path) as caller, contextlib.suppress(OSError, struct.error):
                if not more:
                    export.wait_for("nobody is let in for now")
                    continue
                caller.send(Request.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL))
                caller.send(Request.SET_BACKEND_REQ_FD, b"", [0])
                caller.ask(Request.GET_FEATURES)
            if more == 1:
                assert "is turned away: Too many open files" in export.messages[said:]
            assert export.process.poll() is None, export.messages
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
        with Caller(path) as caller:
            assert len(caller.ask(Request.GET_FEATURES)) == 8
        assert export.stop() == 0
        assert "Traceback" not in export.messages


def test_fault_25_a_lab_short_of_open_files() -> None:
    with limited(7, "lab", "--", "true") as lab:
        said, _ = lab.communicate(timeout=patient(30))
    assert lab.returncode == 125
    assert re.search(r"too few open files: the limit is 7.*`ulimit -n \d+`\n$", said), said
