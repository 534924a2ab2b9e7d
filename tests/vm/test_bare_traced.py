"""The jail's table against what threads really call: a sample of what ``make traced`` runs."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pyvmm.jail import bpf
from tests.support.disk_guest import disk_machine
from tests.support.nbd_servers import nbdkit
from tests.support.storage_daemon import StorageDaemon
from tests.support.table_words import said
from tests.support.tiny_guests import HALT, REPORT_7, TRIPLE_FAULT, prints, write_guest
from tests.support.traced import Traced, trace

pytestmark = pytest.mark.bare


def traced(folder: Path, *code: bytes, options: tuple[str, ...] = ()) -> tuple[int, Traced]:
    """Return the exit status of a run, and what its jailed threads have called."""
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed: apt-get install strace")
    kernel = write_guest(folder / "guest.elf", *code)
    disk = folder / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return trace(
        [sys.executable, "-m", "pyvmm", "run", "--kernel", str(kernel), "--memory", "16M",
         "--disk", str(disk), *options],
        folder, cwd=Path(__file__).parents[2], capture_output=True,
    )


@pytest.mark.parametrize(("code", "options", "status"), [
    ((prints(b"hello\n"), REPORT_7), (), 7),
    ((TRIPLE_FAULT,), ("--cpus", "2"), 122),
    ((prints(b"hello\n"), HALT), ("--serve", "exit"), 0),
], ids=["status", "triple fault", "halt"])
def test_no_call_of_a_run_is_missing_in_the_table(
    code: tuple[bytes, ...], options: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    found_status, found = traced(tmp_path, *code, options=options)
    assert found_status == status
    vcpu = "vcpu-serving" if options[:1] == ("--serve",) else "vcpu"
    assert {vcpu, "entropy", "main"} <= found.kinds
    assert sum(found.calls.values()) > 50
    assert found.missing() == []


@contextlib.contextmanager
def nothing(_: Path) -> Iterator[None]:
    yield


@contextlib.contextmanager
def nbd(folder: Path) -> Iterator[None]:
    with nbdkit(folder / "nbd", "file", str(folder / "disk.img")):
        yield


@contextlib.contextmanager
def vhost_user(folder: Path) -> Iterator[None]:
    with StorageDaemon(folder / "disk.img", folder / "vhost"):
        yield


@pytest.mark.parametrize(("disk", "server", "kinds"), [
    ("{0}/disk.img", nothing, {"disk"}),
    ("{0}/disk.img,snapshot", nothing, {"disk"}),
    ("{0}/disk.img,writeback=off", nothing, {"disk"}),
    ("nbd+unix:///?socket={0}/nbd", nbd, {"disk-network"}),
    ("vhost-user={0}/vhost", vhost_user, {"disk-elsewhere", "vcpu-elsewhere"}),
], ids=["file", "snapshot", "write-through", "NBD", "vhost-user"])
@pytest.mark.parametrize("serve", ["thread", "exit"])
def test_no_call_of_a_disk_is_missing_in_the_table(
    disk: str, server: Callable[[Path], AbstractContextManager[None]], kinds: set[str], serve: str,
    tmp_path: Path,
) -> None:
    kernel = disk_machine(tmp_path, rounds=20).kernel  # a typed byte ends it
    with server(tmp_path):
        status, found = trace(
            [sys.executable, "-m", "pyvmm", "run", "--kernel", str(kernel), "--memory", "16M",
             "--serve", serve, "--disk", disk.format(tmp_path), "--timeout", "60"],
            tmp_path, cwd=Path(__file__).parents[2], capture_output=True, input=b"x",
        )
    assert status == 0
    assert kinds <= found.kinds or serve == "exit"
    assert found.missing() == []


def test_the_trace_sees_what_the_table_lacks() -> None:
    found = Traced()
    found.calls["vcpu", "execve", (0,) * 6] = 2
    found.calls["vcpu", "read", (0,) * 6] = 1
    assert found.missing() == ["vcpu: execve(0x0, 0x0, 0x0, 0x0, ...) 2 times"]
    assert said("vcpu", "read", (0,) * 6) == bpf.ALLOW
    assert not any(line.startswith("read :") for line in found.unused())
    assert any(line.startswith("write :") for line in found.unused())
