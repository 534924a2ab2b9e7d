"""``pyvmm.launch`` with Linux: commands, files, and ends of every kind, in two boots."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvmm
from pyvmm import Kind
from tests.support.guest import IMAGE, KERNEL
from tests.support.patience import patient

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(900)]


CONFIG = pyvmm.MachineConfig(
    kernel=KERNEL, disks=[pyvmm.Overlay(IMAGE)], append="quiet", agent=True
)


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyvmm.Vm]:
    """One guest for all tests that leave it running."""
    os.environ["PYVMM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    log = tmp_path_factory.mktemp("logs") / "console"
    with pyvmm.launch(CONFIG, console_log=log) as vm:
        vm.wait_for_agent(patient(120))
        yield vm


def test_commands(booted: pyvmm.Vm) -> None:
    vm = booted
    assert vm.run(["uname", "-s"], check=True).stdout == "Linux\n"
    done = vm.run(["sh", "-c", r"printf '\377out'; echo err >&2; exit 7"])
    assert (done.status, done.stdout_bytes, done.stderr) == (7, b"\xffout", "err\n")
    assert vm.run(["cat"], input="typed", cwd="/tmp", env={"A": "b"}).stdout == "typed"
    assert vm.run(["sh", "-c", "sleep 600"], timeout_s=1).timed_out
    assert vm.run(["sh", "-c", "kill -SEGV $$"]).signal == signal.SIGSEGV
    with pytest.raises(pyvmm.AgentError, match="no-such-program") as error:
        vm.run(["no-such-program"])
    assert error.value.errno == 2
    began_s = time.monotonic()
    assert vm.run(["sh", "-c", "sleep 4321 & echo started"]).stdout == "started\n"
    assert time.monotonic() - began_s < patient(20)
    with vm.begin(["cat"]) as command:
        command.write("line\n")
        assert command.stdout.readline() == b"line\n"
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(vm.run(["sh", "-c", "sleep 1; id -u"]).stdout))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["0\n"] * 8


def test_much_output_in_bounded_memory(booted: pyvmm.Vm) -> None:
    class Counted(io.RawIOBase):
        count = 0

        def write(self, data: object) -> int:
            self.count += len(data)  # type: ignore[arg-type]
            return len(data)  # type: ignore[arg-type]

    out, err = Counted(), Counted()
    done = booted.run(
        ["sh", "-c", "head -c 67108864 /dev/zero & head -c 67108864 /dev/zero >&2; wait"],
        stdout=out, stderr=err, timeout_s=patient(300),  # type: ignore[arg-type]
    )
    assert done.is_success
    assert (out.count, err.count) == (64 << 20, 64 << 20)


def test_files(booted: pyvmm.Vm, tmp_path: Path) -> None:
    vm = booted
    data = os.urandom(4 << 20)
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "data").write_bytes(data)
    (tmp_path / "tree" / "link").symlink_to("sub/data")
    vm.put(tmp_path / "tree", "/tmp/")
    found = vm.run(["sha256sum", "/tmp/tree/link"], check=True).stdout.split()[0]
    assert found == hashlib.sha256(data).hexdigest()
    vm.get("/tmp/tree", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "data").read_bytes() == data
    vm.write("/tmp/note", "text", mode=0o600)
    assert vm.run(["stat", "-c", "%a %u", "/tmp/note"]).stdout == "600 0\n"
    assert vm.read("/tmp/note") == b"text"
    assert b"Linux version" in vm.read("/proc/version")
    assert b"Linux version" in vm.read("/dev/kmsg")  # ends where the log does


def test_the_machine_beside_the_agent(booted: pyvmm.Vm) -> None:
    vm = booted
    vm.run(["sh", "-c", "echo hello from user space >/dev/console"], check=True)
    vm.console.expect("hello from user space", patient(20))
    assert vm.pause()
    assert vm.registers().cr3
    with pytest.raises(pyvmm.PyvmmError):
        vm.memory.read(1 << 40, 1)
    vm.resume()
    assert vm.run(["true"], timeout_s=patient(60)).is_success
    vm.refresh_disks()
    assert vm.outcome is None


def test_a_panic_ends_whatever_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "console"
    with pyvmm.launch(CONFIG, console_log=log) as vm:
        vm.wait_for_agent(patient(120))
        began_s = time.monotonic()
        with pytest.raises(pyvmm.EndedError, match=r"kernel panic.*sysrq") as error:
            vm.run(["sh", "-c", "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; "
                    "sleep 600"], timeout_s=600)
        assert time.monotonic() - began_s < patient(60)
        assert error.value.outcome.kind is Kind.PANIC
        assert vm.wait() is error.value.outcome
        assert vm.evidence["has_panicked"] is True
        with pytest.raises(pyvmm.EndedError):
            vm.read("/etc/passwd")
    assert b"Kernel panic" in log.read_bytes()
