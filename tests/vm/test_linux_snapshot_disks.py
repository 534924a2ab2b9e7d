"""Linux under load on its disks, snapshotted in the middle: everybody's bytes are right."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from pyvmm.board.disks import check_disks
from pyvmm.config import DiskConfig, RunConfig
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.opening import open_snapshot
from pyvmm.snapshot.snapshot import Snapshot
from pyvmm.storage.open import DiskSource
from tests.support.linux_machine import LinuxMachine, linux_config
from tests.vm.test_linux_save import PASSES, start_load, wait_for_passes

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(1800)]

ROUNDS = 4


def saveable(folder: Path, *overlays: str) -> RunConfig:
    """``linux_config`` with disks that can be saved; ``overlays`` are the files of the last."""
    config = linux_config(folder, data_disks=2)
    disks = [config.disks[0]]
    for disk, overlay in zip(config.disks[1:], overlays, strict=True):
        assert isinstance(disk, DiskConfig)
        disks.append(disk.replace(source=DiskSource(
            location=disk.location, snapshot=True, overlay=overlay
        )))
    return config.replace(disks=tuple(disks))


def clone_of(snapshot: Snapshot, folder: Path, number: int) -> LinuxMachine:
    """Return a clone, started, that writes its console to a file."""
    console = str(folder / f"clone{number}")
    machine = snapshot.clone(console=console, timeout_s=900.0, report=pytest.fail)
    machine.start()
    return LinuxMachine(machine.config.replace(console=console), machine)


@pytest.mark.parametrize("into", ["memory", "directory"])
def test_fio_verifies_in_the_original_and_in_every_clone(tmp_path: Path, into: str) -> None:
    with LinuxMachine(saveable(tmp_path, "", str(tmp_path / "c.overlay"))) as linux:
        check_disks(linux.machine.board, into_directory=True)
        linux.begin()
        start_load(linux)
        linux.run("touch /mnt/vdb /mnt/vdc")  # which are asked for before fio has made one
        wait_for_passes(linux, 1)
        complaints = linux.complaints()
        for number in range(ROUNDS):
            directory = None if into == "memory" else tmp_path / f"saved{number}"
            with closing(take(linux.machine, directory)) as snapshot:
                with clone_of(snapshot, tmp_path, number) as clone:
                    wait_for_passes(clone, PASSES)
                    assert clone.complaints() == complaints
                    with (
                        closing(take(clone.machine)) as second,
                        clone_of(second, tmp_path, number + 100) as other,
                    ):
                        wait_for_passes(other, 1)
                wait_for_passes(linux, 1)
            if directory is not None:
                opened = open_snapshot(directory, report=pytest.fail)
                with closing(opened), clone_of(opened, tmp_path, number + 200) as clone:
                    wait_for_passes(clone, 1)
        assert linux.complaints() == complaints
    assert not any((tmp_path / "data0.img").read_bytes())
