"""The files that runs need, and what is wrong with them: looked at before the first boot."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from pyvmm.errors import ConfigError
from pyvmm.matrix.plan import Plan
from pyvmm.matrix.runs import Run
from pyvmm.startup.types import Record
from pyvmm.testing.usable_kvm import problem_for


class Need(Record):
    """A file that a run needs: ``key`` is its place in the matrix's file, ``kind`` among
    ``kernel``, ``file``, ``disk`` and ``any``."""

    key: str
    path: str
    kind: str


def needs_of(plan: Plan, runs: Sequence[Run]) -> tuple[Need, ...]:
    """Return the needs of ``runs``, each once."""
    found = [need for run in runs for need in _needs(run)]
    return tuple(dict.fromkeys(need.replace(key=f"{plan.file}: {need.key}") for need in found))


def problems(needs: Sequence[Need]) -> list[tuple[str, str]]:
    """Return subject and problem for each of ``needs`` that is not met on this host."""
    return [(need.key, problem) for need in needs if (problem := _problem(need))]


def kvm_problems(needs: Sequence[Need]) -> list[tuple[str, str]]:
    """Return a problem if this host's KVM cannot run a kernel among ``needs``."""
    for need in needs:
        if need.kind == "kernel" and (problem := problem_for(need.path)):
            return [(need.key, problem)]
    return []


def refuse_missing(needs: Sequence[Need], where: str = "") -> None:
    """Raise ConfigError if a file is missing on this host."""
    refuse(problems(needs), where)


def refuse(found: Sequence[tuple[str, str]], where: str = "") -> None:
    """Raise ConfigError for the first of the problems ``found``; ``where`` names another host."""
    if found:
        subject, problem = found[0]
        more = f" (and {len(found) - 1} more like this)" if len(found) > 1 else ""
        raise ConfigError(subject, f"{problem}{where}{more}")


def _needs(run: Run) -> Iterator[Need]:
    kernel, disk, command = (run.place(axis) for axis in ("kernel", "disk", "command"))
    yield Need(key=f"kernels.{kernel}", path=run.guest.kernel, kind="kernel")
    if run.guest.initrd:
        yield Need(key=f"kernels.{kernel}.initrd", path=run.guest.initrd, kind="file")
    for one in run.guest.disks:
        for path in one.source.files:
            if path and "://" not in path:
                kind = "disk" if path == one.location else "file"
                yield Need(key=f"disks.{disk}", path=path, kind=kind)
    for source, _ in run.order.puts:
        yield Need(key=f"commands.{command}.put", path=source, kind="any")


def _problem(need: Need) -> str:
    """Return what is wrong with the file of ``need``; "" if nothing."""
    path = need.path
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return f"{path}: {error.strerror}"
    is_fit = {
        "kernel": stat.S_ISREG(mode), "file": stat.S_ISREG(mode),
        "disk": stat.S_ISREG(mode) or stat.S_ISBLK(mode), "any": True,
    }[need.kind]
    if not is_fit:
        return f"{path}: is not a file"
    return "" if os.access(path, os.R_OK) else f"{path}: Permission denied"
