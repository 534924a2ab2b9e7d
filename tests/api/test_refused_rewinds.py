"""A machine with a disk that cannot be brought back is not touched by a rewind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import pyvmm
from tests.support.patience import patient
from tests.support.tiny_guests import echoes, prints, write_guest

pytestmark = pytest.mark.bare

SIZE = 1 << 20


def goes_on(machine: pyvmm.Machine) -> None:
    """The guest runs as if nobody had asked for a rewind."""
    assert not machine.is_paused
    machine.console.write("x")
    machine.console.expect("x", patient(20))
    assert machine.wait(0.1) is None


@pytest.fixture
def config(tmp_path: Path) -> pyvmm.MachineConfig:
    """A machine that echoes; its disk has overlay=FILE, so that a snapshot can be taken."""
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    return pyvmm.MachineConfig(
        kernel=write_guest(tmp_path / "guest.elf", prints(b"ready\n"), echoes()), memory="32M",
        disks=[pyvmm.Overlay(tmp_path / "disk.img", tmp_path / "overlay")],
    )


def test_an_overlay_in_a_file_is_refused_before_the_guest_is_held(
    config: pyvmm.MachineConfig
) -> None:
    with pyvmm.Machine(config) as machine:
        machine.start()
        machine.console.expect("ready", patient(20))
        with machine.snapshot(), pytest.raises(pyvmm.SnapshotError, match="has overlay=FILE"):
            machine.rewind()
        goes_on(machine)


@pytest.mark.parametrize(("disk", "problem"), [
    (lambda at: pyvmm.RawDisk(at / "other.img"), "is written in place"),
    (lambda at: pyvmm.Overlay(at / "disk.img", at / "other"), "has overlay=FILE"),
    (lambda at: pyvmm.FaultyDisk(pyvmm.Overlay(at / "disk.img"), "write 9: EIO"),
     "has faults, and had none in the snapshot"),
])
def test_a_clone_with_a_disk_of_its_own_is_refused_before_the_guest_is_held(
    config: pyvmm.MachineConfig, tmp_path: Path, disk: Callable[[Path], pyvmm.Overlay],
    problem: str,
) -> None:
    (tmp_path / "other.img").write_bytes(bytes(SIZE))
    with pyvmm.Machine(config) as machine:
        machine.start()
        machine.console.expect("ready", patient(20))
        snapshot = machine.snapshot()
    with snapshot, snapshot.clone(disks={0: disk(tmp_path)}) as clone:
        clone.start()
        goes_on(clone)
        with pytest.raises(pyvmm.SnapshotError, match=problem):
            clone.rewind()
        goes_on(clone)
