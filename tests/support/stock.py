"""Debian's kernels as guests: ``make stock`` fetches them and notes where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.guest import BUILD, TOOLS, Run, boot, run_in_guest

STABLE, BACKPORTS = "debian", "debian-backports"


@dataclass(frozen=True, slots=True)
class StockKernel:
    """A kernel of Debian's: its files, and what ``uname -r`` says in it."""

    release: str
    vmlinuz: Path
    vmlinux: Path
    initramfs: Path


def stock_kernel(name: str) -> StockKernel:
    """STABLE or BACKPORTS."""
    # What `pyvmm kernel fetch` printed: in the lab there is no network to ask it again.
    lines = (BUILD / f"{name}.txt").read_text("utf-8").splitlines()
    said = dict(line.split(maxsplit=1) for line in lines)
    vmlinuz = Path(said["kernel"])
    return StockKernel(
        release=vmlinuz.name.removeprefix("vmlinuz-"), vmlinuz=vmlinuz,
        vmlinux=Path(said["vmlinux"]), initramfs=Path(said["initramfs"]),
    )


def boot_stock(
    name: str, script: str, *options: str | Path, append: str = "",
    root: str = f"{TOOLS},snapshot",
) -> Run:
    """Run ``script`` in a guest of the kernel ``name``; its first disk is ``--disk root``."""
    kernel = stock_kernel(name)
    return boot(
        "--initrd", kernel.initramfs, "--disk", root, *options, "-v",
        append=f"root=/dev/vda {append} {run_in_guest(script)}", kernel=kernel.vmlinuz,
    )
