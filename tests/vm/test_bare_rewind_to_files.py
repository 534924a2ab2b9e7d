"""A machine goes back to the newest snapshot that was taken of it, wherever that is."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyvmm
from tests.support.patience import patient
from tests.support.tiny_guests import SPIN, prints, write_guest

pytestmark = pytest.mark.bare
MARK = 0x5000


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("in_directory", [False, True])
def test_the_newest_snapshot_is_gone_back_to(
    tmp_path: Path, in_directory: bool, live: bool
) -> None:
    kernel = write_guest(tmp_path / "guest.elf", prints(b"hello\n"), SPIN)
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    config = pyvmm.MachineConfig(kernel=kernel, memory="32M", disks=[pyvmm.Overlay(disk)])
    with pyvmm.Machine(config) as machine:
        machine.start()
        machine.console.expect("hello", timeout_s=patient(20))
        for number in range(3):
            assert machine.pause(patient(20))
            machine.memory.write(MARK, bytes([number]))
            machine.resume()
            place = tmp_path / f"{number}" if in_directory else None
            machine.snapshot(place, live=live).close()
            assert machine.pause(patient(20))
            machine.memory.write(MARK, b"\xff")
            machine.rewind()
            assert machine.memory.read(MARK, 1) == bytes([number])
            machine.memory.write(MARK, b"\xfe")
            machine.rewind()
            assert machine.memory.read(MARK, 1) == bytes([number])
            assert machine.is_paused
            machine.resume()
            assert machine.wait(0.05) is None


def test_a_checkpoint_after_it_is_newer(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest.elf", prints(b"hello\n"), SPIN)
    with pyvmm.Machine(pyvmm.MachineConfig(kernel=kernel, memory="32M")) as machine:
        machine.start()
        machine.console.expect("hello", timeout_s=patient(20))
        assert machine.pause(patient(20))
        for mark, keep in (
            (b"a", machine.checkpoint), (b"b", lambda: machine.snapshot(tmp_path / "b").close()),
            (b"c", machine.checkpoint), (b"d", lambda: machine.snapshot().close()),
        ):
            machine.memory.write(MARK, mark)
            keep()
            machine.memory.write(MARK, b"x")
            machine.rewind()
            assert machine.memory.read(MARK, 1) == mark


def test_diffs_over_one_that_was_gone_back_to(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest.elf", prints(b"hello\n"), SPIN)
    with pyvmm.Machine(pyvmm.MachineConfig(kernel=kernel, memory="32M")) as machine:
        machine.start()
        machine.console.expect("hello", timeout_s=patient(20))
        machine.snapshot(tmp_path / "full").close()
        with pytest.raises(pyvmm.SnapshotError, match="a diff is a directory over another one"):
            machine.snapshot(tmp_path / "diff", diff=True)
        machine.rewind()
        assert machine.pause(patient(20))
        machine.memory.write(MARK, b"new")
        machine.snapshot(tmp_path / "diff", diff=True).close()
    with pyvmm.Snapshot.open(tmp_path / "diff") as snapshot, snapshot.clone() as clone:
        assert clone.memory.read(MARK, 3) == b"new"
        clone.start()
        assert clone.wait(0.05) is None
