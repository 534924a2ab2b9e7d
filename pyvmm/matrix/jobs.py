"""How many guests a host can have at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from pyvmm.config import MAX_SIZE_BYTES
from pyvmm.matrix.runs import Run
from pyvmm.numerals import size_in_bytes

MAX_JOBS = 64


def default_jobs(runs: Sequence[Run]) -> int:
    """Return how many of ``runs`` this host's processors and free memory carry at a time."""
    cpus = max(run.guest.cpus for run in runs)
    by_cpus = len(os.sched_getaffinity(0)) // cpus
    return max(1, min(by_cpus, _available_bytes() // largest_memory(runs), MAX_JOBS))


def largest_memory(runs: Sequence[Run]) -> int:
    """Return the bytes of RAM of the largest guest."""
    return max(size_in_bytes(run.guest.memory, MAX_SIZE_BYTES) or 1 for run in runs)


def _available_bytes() -> int:
    """Return the memory that new processes can have."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return MAX_SIZE_BYTES
