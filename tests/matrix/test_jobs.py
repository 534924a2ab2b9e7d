"""How many guests run at a time if nobody says so."""

from __future__ import annotations

import os

import pytest

from pyvmm.matrix.jobs import MAX_JOBS, default_jobs
from pyvmm.matrix.runs import Guest, Order, Run


def run(memory: str, cpus: int) -> Run:
    """Return a run of a guest of this size."""
    return Run(
        name="r", places=("", "", "", "", ""), order=Order(argv=("true",)),
        guest=Guest(kernel="k", memory=memory, cpus=cpus),
    )


@pytest.mark.parametrize(("host_cpus", "runs", "jobs"), [
    (8, [run("16M", 1)], 8),
    (8, [run("16M", 1), run("16M", 4)], 2),
    (2, [run("16M", 4)], 1),
    (8, [run("512G", 1)], 1),
    (1000, [run("1", 1)], MAX_JOBS),
])
def test_the_largest_guest_decides(
    host_cpus: int, runs: list[Run], jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(host_cpus)))
    assert default_jobs(runs) == jobs
