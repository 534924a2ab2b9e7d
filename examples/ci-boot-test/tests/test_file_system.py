"""A file system on a disk that goes wrong where we want it to."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pyvmm


def journal_sectors(image: Path) -> str:
    """Return the sectors of the journal behind its superblock, in an ext4 of 4 KiB blocks."""
    command = ["/sbin/debugfs", "-R", "blocks <8>", str(image)]
    blocks = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return f"{8 * int(blocks[1])}-{8 * int(blocks[-1]) + 7}"


def test_ext4_is_read_only_after_its_journal_cannot_be_written(
    pyvmm_boot: Callable[..., pyvmm.Vm], tmp_path: Path
) -> None:
    image = tmp_path / "data.img"
    subprocess.run(["/sbin/mke2fs", "-qb4096", "-text4", image, "64M"], check=True)
    disk = pyvmm.FaultyDisk(pyvmm.RawDisk(image), f"write * sectors {journal_sectors(image)}: EIO")
    vm = pyvmm_boot(disks=["root.img", disk])
    vm.run(["mount", "-oerrors=remount-ro", "/dev/vdb", "/mnt"], check=True)
    done = vm.run(["sh", "-c", "touch /mnt/a; sync; touch /mnt/b"])
    assert "/mnt/b: Read-only file system" in done.stderr
    vm.console.expect(r"EXT4-fs \(vdb\): Remounting filesystem read-only")
