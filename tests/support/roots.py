"""Partitioned disks, each partition a root of another kind; nothing is mounted to make them.

``python -m tests.support.roots`` leaves them in build/: on the host, since mkfs.btrfs takes a file
and a directory of the lab's overlay for one when their inodes have the same number.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pyvmm.linux import initramfs

BUILD = Path(__file__).resolve().parents[2] / "build"
DISKS = (BUILD / "roots-gpt.img", BUILD / "roots-dos.img")
"""/dev/vda, with a GPT, and /dev/vdb, with an MBR; a root on each partition."""
MIB = 1 << 20
INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
mounted=$(/bin/busybox grep ' / ' /proc/mounts)
/bin/busybox echo "root is $0 of $(/bin/busybox cat /where), $mounted"
! /bin/busybox grep -q find-all /proc/cmdline || /bin/busybox sh /find </wanted
exec /bin/busybox poweroff -f
"""
FIND = """\
. /stock_init.sh
while read -r root; do
  echo "found $root at $(find_device "$root")"
done
"""
"""Uses the functions of the initramfs's init once more."""
SIZES_MIB = {"ext4": 16, "squashfs": 16, "btrfs": 128, "xfs": 304}
"""xfs and btrfs take no less; next to nothing of it is written."""


GPT_UUID = "0fc63daf-8483-4772-8e79-3d69d8477d{:02x}"
FILE_SYSTEM_UUID = "70797669-6d6d-4000-8000-0000000000{:02x}"
DOS_ID = "0badc0de"
GPT = {1: "ext4", 2: "squashfs", 3: "xfs", 4: "btrfs"}
DOS = {1: "btrfs", 2: "xfs", 5: "squashfs", 6: "ext4"}
GPT_TABLE = "label: gpt\n" + "\n".join(
    f'size={size}MiB, uuid={GPT_UUID.format(number).upper()}, name="{GPT[number]} root"'
    for number, size in ((1, 16), (2, 16), (3, 304), (4, 128))
)
DOS_TABLE = f"""\
label: dos
label-id: 0x{DOS_ID}
1 : size=128MiB, type=83
2 : size=304MiB, type=83
4 : size=100MiB, type=5
5 : size=16MiB, type=83
6 : size=16MiB, type=83
"""
WANTED = {
    "/dev/vda": "/dev/vda", "/dev/vdb6": "/dev/vdb6", "/dev/vdc": "",
    f"UUID={FILE_SYSTEM_UUID.format(0x11)}": "/dev/vda1",
    f"UUID={FILE_SYSTEM_UUID.format(0x22)}": "/dev/vdb2",
    f"UUID={FILE_SYSTEM_UUID.format(0x14)}": "/dev/vda4",
    "LABEL=gpt3": "/dev/vda3", "LABEL=dos1": "/dev/vdb1", "LABEL=dos6": "/dev/vdb6",
    f"PARTUUID={GPT_UUID.format(3).upper()}": "/dev/vda3",
    f"PARTUUID={GPT_UUID.format(1)}/PARTNROFF=3": "/dev/vda4",
    f"PARTUUID={GPT_UUID.format(9)}": "",
    f"PARTUUID={DOS_ID.upper()}-01": "/dev/vdb1",
    f"PARTUUID={DOS_ID}-06": "/dev/vdb6",
    f"PARTUUID={DOS_ID}-05/PARTNROFF=-3": "/dev/vdb2",
    "PARTLABEL=btrfs root": "/dev/vda4",
    "254:3": "/dev/vda3", "fe12": "/dev/vdb2", "254:99": "",
}
"""Where each root is; asked on both kernels, of which one says itself what PARTUUIDs there are."""


def make_tree(tree: Path, where: str, wanted: Sequence[str] = ()) -> Path:
    """The files of a root whose init says that it is ``where``, and powers off; before that, with
    ``find-all`` on the command line, it finds ``wanted``, each as in ``root=``."""
    for name in ("bin", "sbin", "dev", "proc", "sys"):
        (tree / name).mkdir(parents=True)
    shutil.copy(find_tool("busybox"), tree / "bin" / "busybox")
    for init in ("sbin/init", "bin/other-init"):
        (tree / init).write_text(INIT)
        (tree / init).chmod(0o755)
    for applet in initramfs.APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    shutil.copy(initramfs.INIT, tree / "stock_init.sh")
    for name, text in (("find", FIND), ("where", f"{where}\n"),
                       ("wanted", "".join(f"{root}\n" for root in wanted))):
        (tree / name).write_text(text)
    return tree


def make_file_system(path: Path, kind: str, tree: Path, *, label: str, uuid: str) -> None:
    """A file system of ``kind`` with the files of ``tree``; squashfs has neither label nor UUID."""
    with path.open("wb") as file:
        file.truncate(SIZES_MIB[kind] * MIB)
    if kind == "ext4":
        run("mke2fs", "-q", "-F", "-t", "ext4", "-L", label, "-U", uuid, "-d", tree, path)
    elif kind == "btrfs":
        run("mkfs.btrfs", "-q", "-L", label, "-U", uuid, "--rootdir", tree, path)
    elif kind == "squashfs":
        run("mksquashfs", tree, path, "-noappend", "-quiet", "-no-progress")
    else:
        prototype = path.with_suffix(".prototype")
        prototype.write_text("/\n0 0\n" + "\n".join(["d--755 0 0", *_prototype(tree), "$"]) + "\n")
        run("mkfs.xfs", "-q", "-L", label, "-m", f"uuid={uuid}", "-p", prototype, path)


def _prototype(directory: Path) -> list[str]:
    """The lines of mkfs.xfs(8)'s prototype for what is in ``directory``."""
    lines = []
    for path in sorted(directory.iterdir()):
        mode = f"{path.stat().st_mode & 0o777:o}"
        if path.is_symlink():
            lines.append(f"{path.name} l--777 0 0 {path.readlink()}")
        elif path.is_dir():
            lines += [f"{path.name} d--{mode} 0 0", *_prototype(path), "$"]
        else:
            lines.append(f"{path.name} ---{mode} 0 0 {path}")
    return lines


def make_disk(path: Path, table: str, file_systems: dict[int, Path], *, block: int = 512) -> Path:
    """A disk whose partitions sfdisk makes of ``table``, with the ``file_systems`` in them."""
    with path.open("wb") as file:
        file.truncate(640 * MIB)
    tool = find_tool("sfdisk")
    subprocess.run([tool, "-q", "--no-reread", "--no-tell-kernel", path],
                   input=table, text=True, check=True)
    shown = subprocess.run([tool, "-d", path], capture_output=True, text=True, check=True).stdout
    starts = {}
    for line in shown.splitlines():
        if line.startswith(str(path)):
            name, _, fields = line.partition(" : ")
            starts[int(name.removeprefix(str(path)))] = int(fields.split("start=")[1].split(",")[0])
    for number, source in file_systems.items():
        copy_sparse(source, path, starts[number] * block)
    return path


def copy_sparse(source: Path, target: Path, offset: int) -> None:
    """Write what is in ``source`` to ``target`` at ``offset``; holes stay holes."""
    with source.open("rb") as read, target.open("r+b") as write:
        at, end = 0, source.stat().st_size
        while at < end:
            try:
                at = os.lseek(read.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole up to the end
                return
            stop = os.lseek(read.fileno(), at, os.SEEK_HOLE)
            write.seek(offset + at)
            write.write(os.pread(read.fileno(), stop - at, at))
            at = stop


def find_tool(name: str) -> str:
    """The program ``name``; a user's PATH often lacks the directories where these are."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    assert found, f"{name} is missing"
    return found


def run(tool: str, *arguments: str | Path) -> None:
    """Run ``tool``; what it says is in the error if it fails."""
    done = subprocess.run([find_tool(tool), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def make_disks() -> None:
    """Leave ``DISKS`` behind, with ``WANTED`` in two of their roots."""
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        folder = Path(scratch)
        for disk, text, kinds in zip(DISKS, (GPT_TABLE, DOS_TABLE), (GPT, DOS), strict=True):
            table, files = disk.stem.removeprefix("roots-"), {}
            for number, kind in kinds.items():
                name = f"{table}{number}"
                wanted = list(WANTED) if name in ("gpt1", "gpt2") else []
                tree = make_tree(folder / f"{name}.tree", name, wanted)
                files[number] = folder / name
                uuid = FILE_SYSTEM_UUID.format(number + (0x10 if table == "gpt" else 0x20))
                make_file_system(files[number], kind, tree, label=name, uuid=uuid)
            make_disk(folder / disk.name, text, files).replace(disk)


if __name__ == "__main__":
    make_disks()
