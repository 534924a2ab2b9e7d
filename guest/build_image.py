#!/usr/bin/env python3
"""Build the test image: an ext4 disk (and, if asked, an initramfs) with busybox and our init.

    python3 guest/build_image.py --out build/root.img
    python3 guest/build_image.py --out build/fio.img --with-program /usr/bin/fio --size 256M
    python3 guest/build_image.py --initrd build/initramfs.cpio.gz

The code is ``pyvmm/linux/images``; ``pyvmm image build --busybox`` is its other caller.  This one
runs before there is a virtual environment, and has sizes of its own.  Needs no root.  Two runs
over the same files give the same image: identifiers are fixed, and times are SOURCE_DATE_EPOCH or
a constant.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script: the checkout's pyvmm
from pyvmm.errors import PyvmmError
from pyvmm.linux.images.additions import parse_added
from pyvmm.linux.images.build import Request, build
from pyvmm.numerals import size_in_bytes

DEFAULT_SIZE = "64M"
MAX_BYTES = 1 << 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description="Build the test image: busybox and our init.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write an ext4 disk image")
    parser.add_argument("--initrd", type=Path, metavar="FILE",
                        help="write the same tree as an initramfs (cpio.gz)")
    parser.add_argument("--size", default=DEFAULT_SIZE, metavar="SIZE",
                        help="size of the disk image (default: 64M)")
    parser.add_argument("--add", action="append", default=[], metavar="SRC:DST",
                        help="copy a file or directory into the image; repeatable")
    parser.add_argument("--with-program", type=Path, action="append", default=[], metavar="PATH",
                        help="copy a program and the libraries it loads; repeatable")
    options = parser.parse_args(arguments)
    if options.out is None and options.initrd is None:
        parser.error("nothing to do: give --out, --initrd or both")
    size_bytes = size_in_bytes(options.size, MAX_BYTES)
    if size_bytes is None:
        parser.error(f"--size {options.size} is not a size like 64M")
    try:
        added = tuple(parse_added(text) for text in options.add)
        for out, kind in ((options.out, "ext4"), (options.initrd, "initramfs")):
            if out is not None:
                build(
                    Request(
                        out=out, is_busybox=True, kind=kind, added=added, replaces=True,
                        programs=tuple(options.with_program),
                        size_bytes=size_bytes if kind == "ext4" else None,
                    ),
                    lambda line: print(line, file=sys.stderr),
                )
    except (PyvmmError, OSError, subprocess.CalledProcessError) as error:
        print(f"guest/build_image.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
