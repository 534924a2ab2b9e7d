"""One run of a matrix as a boot test."""

from __future__ import annotations

from pyvmm.errors import HostError
from pyvmm.matrix.executor import Watch
from pyvmm.matrix.results import RunResult
from pyvmm.matrix.runs import Run


def run_one(run: Run, folder: str, watch: Watch) -> RunResult:
    """Boot the guest of ``run`` and have its command done; logs go into ``folder``."""
    raise HostError("there is no boot test yet")
