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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script: the checkout's pyvmm
from pyvmm.errors import PyvmmError
from pyvmm.linux import debian, packages
from pyvmm.linux.cache import build_once, cache_directory, source_key
from pyvmm.linux.host import find_tool, run_tool
from pyvmm.linux.images import archive, debootstrap, ext
from pyvmm.linux.images import tree as image_tree
from pyvmm.linux.images.tool import Details

SIZE_BYTES = 384 << 20
IMAGE = "debian.img"
UUID = "70797669-6d6d-4000-8000-00000000debc"
FSTAB = "/dev/vda / ext4 defaults 0 1\n"


def say(text: str) -> None:
    print(f"debian image: {text}", file=sys.stderr, flush=True)


def build(suite: str, stock: debian.StockKernel, work: Path) -> None:
    """Leave the image in ``work``, and nothing else; HostError."""
    for tool, package in (("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs"), ("depmod", "kmod")):
        find_tool(tool, package)
    say(f"installing {suite} into an image (once; kept in the cache)...")
    packed, root = work / "tree.tar", work / "tree"
    debootstrap.bootstrap(suite, packed)
    root.mkdir()
    tree = archive.unpack(str(packed), root)
    packed.unlink()
    changed = debootstrap.configure(root)
    (root / "etc/fstab").write_text(FSTAB)
    changed += add_modules(stock, root, work)
    write_image(image_tree.with_files(tree, changed), work / IMAGE)
    shutil.rmtree(root)


def write_image(tree: image_tree.Tree, image: Path) -> None:
    """Make an ext4 ``image`` of ``tree``."""
    ext.write("ext4", tree, image, SIZE_BYTES, Details(label="debian", uuid=UUID))


def add_modules(stock: debian.StockKernel, root: Path, work: Path) -> list[str]:
    """Put the modules of ``stock`` into ``root``, indexed for udev; return what was written."""
    apt = packages.host_apt()
    name = f"linux-image-{stock.release}"

    def attempt() -> Path:
        found = debian.unpack_image(apt, apt.find(name, stock.version), work, say)
        return debian.find_in(found, f"**/lib/modules/{stock.release}", name)

    modules = apt.retrying(attempt, say)
    target = root / "usr/lib/modules" / stock.release
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(modules, target)
    shutil.rmtree(work / "package")
    run_tool([find_tool("depmod", "kmod"), "-b", str(root), stock.release], "depmod failed")
    made = [target.parent, target, *target.rglob("*")]
    return [str(path.relative_to(root)) for path in made]


def main() -> int:
    parser = argparse.ArgumentParser(description="Build an ext4 disk with Debian and systemd.")
    parser.add_argument("--out", type=Path, required=True, help="the image to write")
    out: Path = parser.parse_args().out
    cache = cache_directory()
    try:
        suite = packages.codename()
        stock = debian.fetch(cache, say)

        def make(work: Path, _: object) -> str:
            build(suite, stock, work)
            return "amd64"

        key = source_key(
            __file__, packages.__file__, debootstrap.__file__, archive.__file__, ext.__file__
        )
        prefix = f"debian-image-{key}-{suite}_{stock.release}_{stock.version}_"
        found = build_once(cache, "debian-image", prefix, make, say)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            subprocess.run(["cp", "--sparse=always", found / IMAGE, temporary], check=True)
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except (PyvmmError, OSError, subprocess.CalledProcessError) as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
