"""Partitioned disks, each partition a root of another kind; nothing is mounted to make them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pyvmm.linux import initramfs

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
