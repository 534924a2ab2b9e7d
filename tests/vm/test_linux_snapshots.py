"""Linux snapshotted in the middle of its work, again and again: everybody's bytes are right.

``PYVMM_SNAPSHOTS`` is how many snapshots are taken of each, 4 unless set; ``make soak``: 50.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pyvmm.config import DiskConfig, RunConfig
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.opening import open_snapshot
from pyvmm.snapshot.snapshot import Snapshot
from pyvmm.storage.open import DiskSource
from pyvmm.virtio.spec import Feature
from tests.support.fio_load import FioLoad
from tests.support.guest import BUILD, MIB
from tests.support.linux_machine import LinuxMachine, linux_config
from tests.support.patience import patient
from tests.support.stock import BACKPORTS

SNAPSHOTS = int(os.environ.get("PYVMM_SNAPSHOTS", "4"))
WAYS = ("memory", "directory", "memory, live", "directory, live")
"""How a snapshot is taken, in turn."""

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(1800 + 120 * SNAPSHOTS)]


def saveable(config: RunConfig, overlay: Path) -> RunConfig:
    """``config`` with disks that are not written in place; the file ``overlay`` has vdc's.

    It has the time of all SNAPSHOTS.
    """
    disks = []
    for number, disk in enumerate(config.disks):
        assert isinstance(disk, DiskConfig)
        if not disk.read_only:
            path = str(overlay) if number == 2 else ""
            source = DiskSource(location=disk.location, snapshot=True, overlay=path)
            disk = disk.replace(source=source)
        disks.append(disk)
    return config.replace(disks=tuple(disks), timeout_s=patient(900 + 120 * SNAPSHOTS))


def with_split_ring(linux: LinuxMachine, disk: int) -> None:
    """Offer the driver of a disk no packed ring; before the start."""
    device = linux.machine.board.slots[disk].device  # disks have the first slots
    device.avail_features &= ~int(Feature.RING_PACKED)


def packed_rings(linux: LinuxMachine) -> str:
    """1 for each of vdb and vdc that has a packed ring, 0 for each that has none."""
    return linux.run(
        "for d in vdb vdc; do cut -c 35 /sys/block/$d/device/features; done | tr -d '\\n'; echo"
    )


@contextmanager
def snapshot_of(linux: LinuxMachine, way: str, folder: Path) -> Iterator[Snapshot]:
    """A snapshot taken in this ``way``; one in a directory was opened anew, and goes at the end."""
    place, _, live = way.partition(", ")
    if place == "memory":
        with take(linux.machine, live=bool(live)) as snapshot:
            yield snapshot
        return
    take(linux.machine, folder, live=bool(live)).close()
    try:
        with open_snapshot(folder, report=pytest.fail) as snapshot:
            yield snapshot
    finally:
        shutil.rmtree(folder)


def snapshot_in_the_middle(linux: LinuxMachine, load: FioLoad, folder: Path) -> None:
    """Take SNAPSHOTS of ``linux`` under ``load``; a clone of each goes on, and so does it."""
    chance = random.Random(14)
    load.wait_for_passes(linux, 1)
    complaints, began = linux.complaints(), load.passes(linux)
    for number in range(SNAPSHOTS):
        began_s, way = time.monotonic(), WAYS[number % len(WAYS)]
        time.sleep(chance.uniform(0, 2))
        with snapshot_of(linux, way, folder / "saved") as snapshot:
            taken_s = time.monotonic()
            with LinuxMachine.clone_of(snapshot, folder / "clone") as clone:
                if number % 5 == 3:  # now and then a clone of a clone
                    with (
                        closing(take(clone.machine)) as second,
                        LinuxMachine.clone_of(second, folder / "second") as other,
                    ):
                        load.finish(other)
                # The pass that was under way wrote before the snapshot and writes in the clone.
                load.finish(clone)
                assert clone.complaints() == complaints, clone.run("dmesg | tail -n 80")
        print(
            f"snapshot {number + 1}, {way}: {taken_s - began_s:.1f} s, its clone good after"
            f" {time.monotonic() - taken_s:.1f} s", flush=True,
        )
    ended = load.passes(linux)
    assert all(now > then for now, then in zip(ended, began, strict=True))
    load.finish(linux)
    assert linux.complaints() == complaints
    print(f"the original passed {ended} times meanwhile", flush=True)


def test_fio_verifies_two_disks_in_linux_and_in_every_clone(tmp_path: Path) -> None:
    """vdb has a split ring, vdc a packed one."""
    config = saveable(linux_config(tmp_path, console="hvc0"), tmp_path / "overlay")
    with LinuxMachine(config) as linux:
        with_split_ring(linux, 1)
        linux.begin()
        assert packed_rings(linux) == "01"
        snapshot_in_the_middle(linux, FioLoad(linux), tmp_path)
    assert not any((tmp_path / "data0.img").read_bytes())
    assert not any((tmp_path / "data1.img").read_bytes())


def test_fio_verifies_two_disks_in_debian_with_systemd_and_in_every_clone(tmp_path: Path) -> None:
    """Debian's 6.12, two vCPUs; its fio is that of our image."""
    config = linux_config(tmp_path, cpus=2, stock=BACKPORTS)
    tools, *data = config.disks
    root = DiskConfig(source=DiskSource(location=str(BUILD / "debian.img"), snapshot=True))
    config = config.replace(
        disks=(root, *data, tools), memory_bytes=512 * MIB, append="root=/dev/vda rw quiet",
    )
    with LinuxMachine(saveable(config, tmp_path / "overlay")) as linux:
        linux.begin("pyvmm login: ")
        linux.type("root\n")
        linux.wait_for("# ")
        linux.run("systemctl is-system-running --wait")
        failed = linux.run("systemctl --failed --no-legend --plain --no-pager")
        assert linux.run("mkdir /tools; mount -o ro /dev/vdd /tools") == ""
        load = FioLoad(linux, "/tools")
        snapshot_in_the_middle(linux, load, tmp_path)
        assert linux.run("systemctl --failed --no-legend --plain --no-pager") == failed
