"""Running ``pyvmm run`` on our kernel and image as a user does: a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
KERNEL, VMLINUX = BUILD / "bzImage", BUILD / "vmlinux"
TWICE = BUILD / "twice" / "bzImage"  # the same, and it finds disks by the command line too
IMAGE = BUILD / "test.img"  # as build/root.img was before anybody booted it
TOOLS = BUILD / "tools.img"  # the same, with fio, mke2fs, e2fsck and blkdiscard; boot it with ,ro
USER_SPACE = "pyvmm-init: user space reached"
# Far above what a boot takes, and below pytest's own timeout.
TIMEOUT_S = 120

MIB = 1 << 20
ROOT_DISK = ("--disk", f"{TOOLS},ro")
FIO = (
    "fio --name=t --filename={file} --rw=randrw --bs=4k-64k --iodepth=16 --ioengine=libaio"
    " --direct=1 --verify=crc32c --verify_fatal=1 --randrepeat=1 --size={size} --minimal"
    " --aux-path=/mnt --fdatasync=32"
)
"""Writes ``file`` and checks every byte of it; what it prints has ";t;0;0;" if all was well."""


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
    *options: str | Path, append: str = "", kernel: Path = KERNEL, timeout_s: float | None = None
) -> Run:
    """Run to the end, with nothing typed; ``append`` goes behind ``quiet`` on the command line."""
    if timeout_s is None:
        timeout_s = patient(TIMEOUT_S)
    line = ("--timeout", str(timeout_s), *options, "--append", f"quiet {append}")
    done = subprocess.run(
        command(*line, kernel=kernel),
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(),
        timeout=timeout_s + patient(60), check=False,
    )
    console = done.stdout.decode(errors="replace").replace("\r\n", "\n")
    return Run(done.returncode, console, done.stderr.decode(errors="replace"))


def sparse(path: Path, mebibytes: int) -> Path:
    """A new file at ``path`` of so many MiB of nothing."""
    with path.open("wb") as file:
        file.truncate(mebibytes * MIB)
    return path


class Guest:
    """A guest that runs in the background, its root ``TOOLS``, and is heard by console lines.

    As a context manager it is dead when the context is left, whatever has happened.
    """

    def __init__(self, script: str, *options: str) -> None:
        self.process = subprocess.Popen(
            command(*ROOT_DISK, *options, "--timeout", str(patient(120)), "--append",
                    f"quiet {run_in_guest(script)}"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(), text=True, errors="replace",
        )

    def lines(self) -> Iterator[str]:
        """The console's lines from here on."""
        assert self.process.stdout is not None
        return (line.rstrip() for line in self.process.stdout)

    def wait_for(self, start: str) -> str:
        """The next line that begins with ``start``."""
        for line in self.lines():
            if line.startswith(start):
                return line
        raise AssertionError(f"the guest ended without {start!r}: {self.finish()}")

    def finish(self) -> tuple[int, str]:
        """Exit status and what pyvmm said."""
        _, messages = self.process.communicate(timeout=patient(120))
        return self.process.returncode, messages

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
