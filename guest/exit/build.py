#!/usr/bin/env python3
"""Build pyvmm-exit, pyvmm-mark and pyvmm-warm, which our images carry as data of the package.

    python3 guest/exit/build.py        writes them into pyvmm/linux/images

They are in the repository as they were built, so that an image needs no compiler; a test builds
them again and compares.  Standard library only.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "pyvmm/linux/images"
NAMES = ("pyvmm-exit", "pyvmm-mark", "pyvmm-warm")
COMPILER = "gcc (Debian 12.2.0-14+deb12u1) 12.2.0"
"""Made the files in the repository: another one may make others."""
FLAGS = ("-Os", "-Wall", "-Wextra", "-Werror", "-static", "-nostdlib", "-ffreestanding",
         "-fno-pie", "-no-pie", "-fno-stack-protector", "-fcf-protection=none",
         "-fno-asynchronous-unwind-tables", "-fno-ident",
         "-Wl,--build-id=none,-z,noseparate-code,-s")


def build(out: Path) -> None:
    """Leave both programs in the directory ``out``."""
    for name in NAMES:
        subprocess.run(["gcc", *FLAGS, f"{name}.c", "-o", out / name], cwd=HERE, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build pyvmm-exit, pyvmm-mark and pyvmm-warm.")
    parser.add_argument("--out", type=Path, default=TARGET, metavar="DIR")
    build(parser.parse_args(arguments).out.resolve())
    return 0


if __name__ == "__main__":
    main()
