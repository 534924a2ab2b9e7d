"""What every row may use: a scratch directory, disks, compiled programs, how long to measure."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.figures import BenchError
from bench.process import ROOT

BENCH = ROOT / "bench"
BUILD = ROOT / "build"
ROOT_IMAGE, TOOLS_IMAGE = BUILD / "root.img", BUILD / "tools.img"
KERNEL = BUILD / "twice" / "bzImage"
"""The one of ours that finds disks by the command line too, which is all that QEMU's microvm needs:
no guest here has ACPI, so that all boot the same way."""
MEMORY_MIB = 256
DISK_BYTES = 64 << 20
GUEST_ADDRESS = 0x100000
"""Where guests of a few instructions are loaded and entered."""


def scratch_parent() -> Path | None:
    """Where disks are memory, so that no host disk is measured; None: wherever files go."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else None


@dataclass(frozen=True, slots=True)
class Host:
    """``seconds`` is how long one throughput is measured; ``scratch`` is ours to fill."""

    scratch: Path
    seconds: float
    _made: dict[str, Path] = field(default_factory=dict)

    def disk(self) -> Path:
        """64 MiB of a pattern, all of it written, in the page cache; always the same file."""
        return self._once("disk.img", _write_pattern)

    def program(self, name: str) -> Path:
        """``bench/c/NAME.c``, compiled."""
        return self._once(
            name, lambda to: _gcc("-O2", "-o", str(to), str(BENCH / "c" / f"{name}.c"))
        )

    def preload(self, name: str) -> Path:
        """``bench/c/NAME.c`` as a library for LD_PRELOAD."""
        source = str(BENCH / "c" / f"{name}.c")
        return self._once(
            f"{name}.so", lambda to: _gcc("-O2", "-shared", "-fPIC", "-o", str(to), source, "-ldl")
        )

    def guest(self, name: str, *, flat: bool = False, **symbols: int) -> Path:
        """``bench/guests/NAME.S`` as an ELF file, or flat; ``symbols`` are for its preprocessor."""
        values = [f"-D{symbol}={value:#x}" for symbol, value in symbols.items()]
        # One page-aligned segment and no headers in it: -n.
        options = ["-nostdlib", "-static", "-Wl,-n", "-Wl,--build-id=none",
                   f"-Wl,-Ttext={GUEST_ADDRESS:#x}", f"-Wa,-I{BENCH / 'guests'}", *values]
        source = str(BENCH / "guests" / f"{name}.S")

        def make(to: Path) -> None:
            _gcc(*options, "-o", str(to), source)
            if flat:
                _run("objcopy", "-O", "binary", "-j", ".text", str(to))

        tag = "".join(f"-{symbol}={value:#x}" for symbol, value in symbols.items())
        return self._once(f"{name}{tag}{'.bin' if flat else '.elf'}", make)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        if name not in self._made:
            path = self.scratch / name
            make(path)
            self._made[name] = path
        return self._made[name]


def _write_pattern(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(DISK_BYTES >> 20):
            file.write(bytes(range(256)) * 4096)


def _gcc(*arguments: str) -> None:
    _run("gcc", "-Wall", "-Wextra", "-Werror", *arguments)


def _run(program: str, *arguments: str) -> None:
    if shutil.which(program) is None:
        raise BenchError(f"{program} is not installed")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise BenchError(f"{program} failed: {done.stderr.strip()[:400]}")
