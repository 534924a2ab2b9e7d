"""From a plan to its runs: every combination, without the excluded ones, with the included."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterator, Sequence

from pyvmm.errors import ConfigError
from pyvmm.matrix.plan import Plan
from pyvmm.matrix.runs import AXES, Guest, Run
from pyvmm.startup.mistakes import did_you_mean

MAX_RUNS = 1000
SEPARATOR = "+"
"""Between the parts of a run's name; no entry's name has it, so no two runs share a name."""


def runs_of(plan: Plan) -> tuple[Run, ...]:
    """Return the runs of ``plan``, at least one; ConfigError if there are too many, or none."""
    count = math.prod(len(plan.entries(axis)) or 1 for axis in AXES) + len(plan.includes)
    if count > MAX_RUNS:
        sizes = " x ".join(str(len(plan.entries(axis)) or 1) for axis in AXES)
        raise ConfigError(plan.file, f"has {count} runs ({sizes}); the limit is {MAX_RUNS}")
    runs = [*_combinations(plan), *(_run(plan, places, name) for name, places in plan.includes)]
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise ConfigError(plan.file, f"has two runs of the name {run.name}; give the included "
                              "one another name")
        seen.add(run.name)
    if not runs:
        raise ConfigError(f"{plan.file}: exclude", "leaves no run, so the matrix is empty")
    return tuple(runs)


def chosen(runs: Sequence[Run], patterns: Sequence[str]) -> tuple[Run, ...]:
    """Return the runs whose names match one of ``patterns``, as a shell matches files."""
    if not patterns:
        return tuple(runs)
    names = [run.name for run in runs]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            hint = did_you_mean(pattern, names) or f"; the first is {names[0]}"
            raise ConfigError(f"--only {pattern}", f"matches none of the {len(names)} runs{hint} "
                              "(--list shows all)")
    return tuple(
        run for run in runs
        if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns)
    )


def _combinations(plan: Plan) -> Iterator[Run]:
    for places in itertools.product(*(plan.entries(axis) or ("",) for axis in AXES)):
        of_axis = dict(zip(AXES, places, strict=True))
        if not any(
            all(of_axis[axis] == entry for axis, entry in exclude) for exclude in plan.excludes
        ):
            yield _run(plan, places)


def _run(plan: Plan, places: tuple[str, ...], name: str = "") -> Run:
    kernel_name, disk_name, memory, cpus, command = places
    kernel = dict(plan.kernels)[kernel_name]
    disk = dict(plan.disks)[disk_name] if disk_name else None
    appends = (plan.append, kernel.append, disk.append if disk else "")
    parts = (kernel_name, disk_name, memory, f"{cpus}cpu", command)
    return Run(
        name=name or SEPARATOR.join(part for part in parts if part),
        places=places,
        guest=Guest(
            kernel=kernel.kernel, initrd=kernel.initrd, append=" ".join(filter(None, appends)),
            disks=disk.disks if disk else (), memory=memory, cpus=int(cpus), agent=plan.agent,
        ),
        order=dict(plan.commands)[command],
    )
