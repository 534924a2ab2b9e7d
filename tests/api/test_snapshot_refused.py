"""Snapshots and clones that are refused, and mistakes in asking for them."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyvmm
from pyvmm.virtio.entropy.device import EntropyDevice
from tests.support.counting_guest import COUNT, Make, config_maker, count_of, wait_for_more

pytestmark = pytest.mark.bare

config = pytest.fixture(config_maker)


def test_a_device_without_a_state_to_give_is_refused_and_the_guest_goes_on(config: Make) -> None:
    class Stateless(EntropyDevice):
        def save(self) -> dict[str, object]:
            from pyvmm.errors import StateError

            raise StateError("dice", "cannot be saved")

    with pyvmm.Machine(config(COUNT), devices={"dice": Stateless()}) as machine:
        machine.start()
        with pytest.raises(pyvmm.SnapshotError, match="a part of the machine cannot be saved: dic"):
            machine.snapshot()
        before = count_of(machine)
        wait_for_more(machine, before)


def test_a_disk_of_ones_own_device_is_refused(config: Make) -> None:
    from pyvmm.storage.memory import MemoryBackend
    from pyvmm.virtio.block import BlockDevice
    from pyvmm.virtio.block.config import BlockConfig

    disk = BlockDevice(BlockConfig(), MemoryBackend(bytearray(4096), read_only=True))
    with (
        pyvmm.Machine(config(COUNT), devices={"extra": disk}) as machine,
        pytest.raises(pyvmm.SnapshotError, match="device extra: is a disk of the script's"),
    ):
        machine.snapshot()


def test_disks_that_cannot_be_saved_are_refused_while_the_guest_runs(
    config: Make, tmp_path: Path
) -> None:
    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(4096))
    with pyvmm.Machine(config(COUNT, disks=[raw])) as machine:
        machine.start()
        with pytest.raises(pyvmm.SnapshotError, match=r"raw\.img"):
            machine.snapshot()
        assert not machine.is_paused
    with pyvmm.Machine(config(COUNT, disks=[pyvmm.MemoryDisk(4096, read_only=True)])) as machine:
        machine.start()
        with pytest.raises(pyvmm.SnapshotError, match="lives in this process, and a directory"):
            machine.snapshot(tmp_path / "saved")
        with machine.snapshot() as snapshot, snapshot.clone() as clone:
            clone.start()
    assert not (tmp_path / "saved").exists()


def test_a_snapshot_in_a_thread_of_the_run_is_refused(config: Make) -> None:
    errors: list[BaseException] = []

    def hook(_access: object) -> None:
        try:
            machine.snapshot()
        except BaseException as error:
            errors.append(error)
        machine.finish()

    with pyvmm.Machine(config(bytes.fromhex("e699 ebfc"))) as machine:
        machine.on_port(0x99, hook)
        machine.run()
    assert [type(error) for error in errors[:1]] == [RuntimeError]
    assert "would wait for ever" in str(errors[0])
