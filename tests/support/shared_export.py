"""An image of random bytes, and exports of it."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.support.driver_script import SECTORS
from tests.support.export_process import Export

DISK_BYTES = SECTORS * 512


def make_image(path: Path) -> Path:
    """DISK_BYTES that differ."""
    path.write_bytes(random.Random(1).randbytes(DISK_BYTES))
    return path


def open_fds(pid: int | str = "self") -> list[str]:
    """The file descriptors of a process."""
    return sorted(os.listdir(f"/proc/{pid}/fd"))


class SharedExport:
    """An export with eight queues that a whole module uses."""

    def __init__(self, folder: Path, options: str = "") -> None:
        self.image = make_image(folder / "disk.img")
        self.path = folder / "disk.sock"
        self.export = Export(f"{self.image},queues=8{options}", self.path)
        self.pid = self.export.process.pid
