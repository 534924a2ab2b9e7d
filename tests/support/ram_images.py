"""RAM to take images of, and what is left of it in this process."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

from pyvmm.memory import GuestMemory

MIB = 1 << 20
PAGE = 4096
REGIONS = ((0, 3 * MIB + PAGE), (0x4000_0000, 2 * MIB))
"""Two regions, the first of no whole number of MiB."""
SIZE = sum(length for _, length in REGIONS)


def content(memory: GuestMemory) -> bytes:
    """All RAM, as an image has it."""
    return b"".join(bytes(region.view) for region in memory.regions)


def put(memory: GuestMemory, position: int, data: bytes) -> None:
    """Store ``data``, which ends in the region that it begins in, at its place in an image."""
    for region in memory.regions:
        if region.position <= position < region.position + region.length:
            memory.write(region.gpa + position - region.position, data)
            return
    raise AssertionError(position)


def scattered(memory: GuestMemory, *, seed: int = 1, count: int = 12) -> None:
    """Write ``count`` short texts at places that ``seed`` chooses, never zeroes."""
    chosen = random.Random(seed)
    for _ in range(count):
        region = chosen.choice(memory.regions)
        text = chosen.randbytes(chosen.randrange(1, 9000)).replace(b"\0", b"x")
        memory.write(region.gpa + chosen.randrange(region.length - len(text)), text)


def in_use() -> tuple[int, int, list[str]]:
    """Descriptors, mappings of guest RAM's kinds, and threads of this process."""
    maps = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    images = sum("pyvmm-ram" in line or line.endswith("/ram") for line in maps)
    return (
        len(os.listdir("/proc/self/fd")), images, sorted(one.name for one in threading.enumerate())
    )
