#!/usr/bin/env python3
"""Build an ext4 disk with Debian and systemd, and the modules of its kernel for virtual machines.

    python3 guest/build_debian.py --out build/debian.img

It is for the tests: root has no password, and nothing is there beside systemd, udev and what every
Debian has.  The packages come from this host's mirror, by mmdebstrap; the kernel is the one that
``pyvmm kernel fetch debian`` has.  Needs no root where mmdebstrap needs none.

The image is kept in the cache, by what it is made of, so a second run copies a file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pyvmm.errors import HostError  # noqa: E402 - the checkout's own, installed or not
from pyvmm.linux import debian, packages  # noqa: E402
from pyvmm.linux.cache import build_once, cache_directory, source_key  # noqa: E402
from pyvmm.linux.host import install_command, run_tool  # noqa: E402

PACKAGES = ("systemd-sysv", "udev", "kmod")
"""Beside the essential ones, which have a shell and login."""
UNUSED = ("usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*", "usr/share/info/*")
SIZE_BYTES = 384 << 20
IMAGE = "debian.img"
UUID = "70797669-6d6d-4000-8000-00000000debc"
FILES = {
    "etc/hostname": "pyvmm\n",
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    # Without one systemd takes every boot for the first.
    "etc/machine-id": "707976696d6d40008000000000000001\n",
}
TOOL_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""A user's PATH often lacks the directories where e2fsprogs and kmod live."""


TOOLS = {
    "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs", "depmod": "kmod",
}  # fmt: skip


def say(text: str) -> None:
    print(f"debian image: {text}", file=sys.stderr, flush=True)


def build(suite: str, stock: debian.StockKernel, work: Path) -> None:
    """Leave the image in ``work``, and nothing else; HostError."""
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})
    if missing:
        raise HostError(f"{' and '.join(missing)}: missing; run: {install_command(missing)}")
    say(f"installing {suite} into an image (once; kept in the cache)...")
    archive, tree = work / "tree.tar", work / "tree"
    dpkg_options = [f"--dpkgopt=path-exclude=/{pattern}" for pattern in UNUSED]
    run_tool(
        ["mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(PACKAGES)}",
         "--format=tar", *dpkg_options, suite, str(archive), packages.mirror(suite)],
        "mmdebstrap failed",
    )  # fmt: skip
    tree.mkdir()
    # Without root the owners get lost here; owners() has them from the archive.
    run_tool(["tar", "-xpf", str(archive), "-C", str(tree), "--exclude=./dev/*"], "cannot unpack")
    for name, text in FILES.items():
        (tree / name).write_text(text)
    shadow = tree / "etc/shadow"
    mode = shadow.stat().st_mode
    shadow.chmod(0o600)
    shadow.write_text(shadow.read_text().replace("root:*:", "root::", 1))
    shadow.chmod(mode)
    add_modules(stock, tree, work)
    write_image(tree, archive, work / IMAGE)
    shutil.rmtree(tree)
    archive.unlink()


def write_image(tree: Path, archive: Path, image: Path) -> None:
    """Make an ext4 ``image`` of ``tree``, its owners as in ``archive``; the rest is root's."""
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    # Nothing lazy: the guest's kernel would start a thread that writes in the background.
    run_tool(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "debian", "-U", UUID,
         "-d", str(tree), str(image),
         "-E", f"root_owner=0:0,hash_seed={UUID},lazy_itable_init=0,lazy_journal_init=0"],
        "mke2fs failed",
    )  # fmt: skip
    script = image.with_name("owners")
    script.write_text("".join(owners(tree, archive)))
    run_tool(["debugfs", "-w", "-f", str(script), str(image)], "debugfs failed")
    script.unlink()


def add_modules(stock: debian.StockKernel, tree: Path, work: Path) -> None:
    """Put the modules of ``stock`` into ``tree``, indexed for udev."""
    apt = packages.host_apt()
    name = f"linux-image-{stock.release}"

    def attempt() -> Path:
        root = debian.unpack_image(apt, apt.find(name, stock.version), work, say)
        return debian.find_in(root, f"**/lib/modules/{stock.release}", apt.find(name))

    modules = apt.retrying(attempt, say)
    target = tree / "usr/lib/modules" / stock.release
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(modules, target)
    shutil.rmtree(work / "package")
    run_tool(["depmod", "-b", str(tree), stock.release], "depmod failed")


def owners(tree: Path, archive: Path) -> Iterator[str]:
    """debugfs commands for the inodes whose owners got lost when ``archive`` was unpacked."""
    with tarfile.open(archive) as members:
        owned = {os.path.normpath(member.name): (member.uid, member.gid) for member in members}
    for path in tree.rglob("*"):
        name = str(path.relative_to(tree))
        found = path.lstat()
        uid, gid = owned.get(name, (0, 0))
        if (found.st_uid, found.st_gid) != (uid, gid):
            yield f'sif "/{name}" uid {uid}\nsif "/{name}" gid {gid}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description="Build an ext4 disk with Debian and systemd.")
    parser.add_argument("--out", type=Path, required=True, help="the image to write")
    out: Path = parser.parse_args().out
    os.environ["PATH"] = TOOL_PATH
    cache = cache_directory()
    try:
        suite = packages.codename()
        stock = debian.fetch(cache, say)

        def make(work: Path, _: object) -> str:
            build(suite, stock, work)
            return "amd64"

        key = source_key(__file__, packages.__file__)
        prefix = f"debian-image-{key}-{suite}_{stock.release}_{stock.version}_"
        found = build_once(cache, "debian-image", prefix, make, say)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            subprocess.run(["cp", "--sparse=always", found / IMAGE, temporary], check=True)
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except (HostError, OSError, subprocess.CalledProcessError) as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
