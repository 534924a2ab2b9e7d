"""Running ``pyvmm run`` on our kernel and image as a user does: a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
KERNEL, VMLINUX = BUILD / "bzImage", BUILD / "vmlinux"
IMAGE = BUILD / "test.img"  # as build/root.img was before anybody booted it
TOOLS = BUILD / "tools.img"  # the same, with fio, mke2fs, e2fsck and blkdiscard; boot it with ,ro
USER_SPACE = "pyvmm-init: user space reached"
# Far above what a boot takes, and below pytest's own timeout.
TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Run:
    """What a finished run left: exit status, the guest's console, pyvmm's own lines."""

    status: int
    console: str
    messages: str

    def lines(self, prefix: str) -> list[str]:
        """Console lines that start with ``prefix``, without it."""
        found = (re.sub(r"^\[[ \d.]+\] ", "", line) for line in self.console.splitlines())
        return [line.removeprefix(prefix) for line in found if line.startswith(prefix)]


def command(*options: str | Path, kernel: Path = KERNEL) -> list[str]:
    """The argument vector of ``pyvmm run`` with our kernel."""
    arguments = ["--kernel", str(kernel), *map(str, options)]
    return [sys.executable, "-m", "pyvmm", "run", *arguments]


def run_in_guest(script: str) -> str:
    """What to append for our init to run ``script``; quoted, so that the kernel skips it."""
    if '"' in script:
        raise ValueError("a kernel command line cannot quote double quotes")
    return f'pyvmm.run="{script}"'


def environment() -> dict[str, str]:
    """The environment in which ``python -m pyvmm`` finds this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def boot(
    *options: str | Path, append: str = "", kernel: Path = KERNEL, timeout_s: float = TIMEOUT_S
) -> Run:
    """Run to the end, with nothing typed; ``append`` goes behind ``quiet`` on the command line."""
    line = ("--timeout", str(timeout_s), *options, "--append", f"quiet {append}")
    done = subprocess.run(
        command(*line, kernel=kernel),
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(), timeout=timeout_s + 60,
        check=False,
    )
    console = done.stdout.decode(errors="replace").replace("\r\n", "\n")
    return Run(done.returncode, console, done.stderr.decode(errors="replace"))
