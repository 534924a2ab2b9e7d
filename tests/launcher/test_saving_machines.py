"""``Vm.snapshot``, ``checkpoint`` and ``rewind`` with machines on this host's KVM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyvmm
from pyvmm import Kind, MachineConfig
from pyvmm.errors import SnapshotError
from tests.support.guest import environment
from tests.support.launched import is_there, until
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, echoes_once, prints, write_guest

pytestmark = pytest.mark.bare


@pytest.fixture
def asks(tmp_path: Path) -> Path:
    """A guest that waits for a byte, shows it and ends with status 7."""
    return write_guest(
        tmp_path / "guest.elf", prints(b"first half"), echoes_once(), prints(b" bye\n"), REPORT_7
    )


def ctl(socket: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "ctl", str(socket), *words], capture_output=True,
        check=False, env=environment(), timeout=patient(60),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def test_a_run_that_ended_is_run_again_from_its_checkpoint(asks: Path) -> None:
    with pyvmm.launch(MachineConfig(kernel=asks)) as vm:
        pid = vm.pid
        lines: list[str] = []
        vm.console.on_line(lines.append)
        vm.console.expect("first half")
        number = vm.checkpoint()
        numbers = set()
        for turn in range(5):
            letter = chr(ord("a") + turn)
            vm.console.write(letter)
            outcome = vm.wait(patient(20))
            assert outcome is not None
            assert (outcome.kind, outcome.value) == (Kind.GUEST_STATUS, 7)
            vm.settle()
            assert lines[1:] == [f"first half{each} bye" for each in "bcde"[:turn]]
            assert vm.evidence["has_printed"] is True
            vm.rewind(number if turn % 2 else None)
            numbers.add(vm.clone_id)
            assert vm.outcome is None
            assert vm.is_paused
            vm.resume()
        assert len(numbers - {None}) == 5
        assert vm.console.text == "first half" + "".join(f"{each} bye\n" for each in "abcde")
        assert vm.stop().kind is Kind.STOPPED
    assert not is_there(pid)


def test_a_running_and_a_paused_machine_stay_so(asks: Path) -> None:
    with pyvmm.launch(MachineConfig(kernel=asks)) as vm:
        vm.console.expect("first half")
        vm.checkpoint()
        rip = None
        for is_paused in (True, False, True):
            if is_paused:
                assert vm.pause()
                rip = vm.registers().rip
            vm.rewind()
            assert vm.is_paused is is_paused
            if is_paused:
                assert vm.registers().rip == rip or vm.registers().rip > 0
                vm.resume()
        vm.console.write("z")
        outcome = vm.wait(patient(20))
        assert outcome is not None
        assert outcome.value == 7


def test_a_machine_without_a_moment_to_go_back_to_ends_as_ever(asks: Path) -> None:
    with pyvmm.launch(MachineConfig(kernel=asks)) as vm:
        pid = vm.pid
        vm.console.expect("first half")
        with pytest.raises(SnapshotError, match="no checkpoint and no snapshot to go back to"):
            vm.rewind()
        vm.console.write("x")
        assert vm.wait(patient(20)) is not None
        until(lambda: not Path(f"/proc/{pid}/fd").exists() or not os.listdir(f"/proc/{pid}/fd"))
        with pytest.raises(pyvmm.EndedError):
            vm.rewind()


def test_a_snapshot_is_restored_and_cloned(asks: Path, tmp_path: Path) -> None:
    with pyvmm.launch(MachineConfig(kernel=asks)) as vm:
        vm.console.expect("first half")
        with vm.snapshot(tmp_path / "warm") as warm:
            with pytest.raises(SnapshotError):
                vm.snapshot(tmp_path / "warm")
            clones = [warm.clone() for _ in range(3)]
            try:
                assert len({clone.clone_id for clone in clones} - {None}) == 3
                for letter, clone in zip("pqr", clones, strict=True):
                    clone.console.write(letter)
                    outcome = clone.wait(patient(30))
                    assert outcome is not None
                    assert outcome.value == 7
                    assert clone.console.text == f"{letter} bye\n"
                    clone.rewind()
                    clone.resume()
                    clone.console.write("2")
                    assert clone.wait(patient(30)) is not None
                    assert clone.console.text == f"{letter} bye\n2 bye\n"
            finally:
                for clone in clones:
                    clone.close()
        vm.console.write("x")
        outcome = vm.wait(patient(20))
        assert outcome is not None
        assert outcome.value == 7


def test_ctl_saves_and_rewinds_a_machine(asks: Path, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    with pyvmm.launch(MachineConfig(kernel=asks), control=socket) as vm:
        vm.console.expect("first half")
        assert ctl(socket, "checkpoint") == "1\n"
        assert ctl(socket, "checkpoint") == "2\n"
        assert ctl(socket, "rewind", "1") == ""
        assert ctl(socket, "snapshot", str(tmp_path / "warm")) == ""
        until(lambda: vm.clone_id is not None)
        assert f"clone    {vm.clone_id}" in ctl(socket, "status")
        assert (tmp_path / "warm" / "state").exists()
        vm.console.write("x")
        assert vm.wait(patient(20)) is not None


def test_a_disk_that_is_written_in_place_is_refused_before_the_guest_is_paused(
    asks: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    config = MachineConfig(kernel=asks, disks=[str(tmp_path / "disk")])
    with pyvmm.launch(config) as vm:
        vm.console.expect("first half")
        for call in (vm.checkpoint, vm.snapshot, lambda: vm.snapshot(tmp_path / "warm")):
            with pytest.raises(SnapshotError, match="written in place"):
                call()
        assert not (tmp_path / "warm").exists()
        assert not vm.is_paused
