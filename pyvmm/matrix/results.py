"""The result of a run, and which of several is the worst."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyvmm.startup.types import Record
from pyvmm.testing.timeline import Phase

OK, NOT_RUN, INTERRUPTED, NOT_STARTED = "ok", "not run", "interrupted", "could not run"
"""Verdicts that the matrix itself gives, besides those of ``pyvmm.testing``."""
INTERRUPTED_STATUS, HOST_STATUS = 130, 125
BADNESS = (INTERRUPTED_STATUS, HOST_STATUS, 123, 122, 121, 120, 124)
"""Exit statuses from the worst on.  Behind them stand the commands' own, the highest first, then
0: a command that fails has at least been run."""
MAX_LINE, MAX_LINES = 400, 40
"""The most characters of a line, and the most lines, that a result quotes of a console."""


class RunResult(Record):
    """The end of a run.

    ``verdict`` is one of the names above or of those that ``pyvmm.testing`` gives.  ``line`` is
    the line of the console that decided, ``before`` the lines before it.  ``problems`` tell of
    logs that could not be written.  ``where`` is the worker, "" for this host.  ``began_s`` counts
    from the start of the matrix.
    """

    name: str
    verdict: str
    exit_status: int
    message: str = ""
    line: str = ""
    before: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    seconds: float = 0.0
    began_s: float = 0.0
    where: str = ""
    registers: str = ""
    tail: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """True if the run did what it should."""
        return self.verdict == OK

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        values = {name: getattr(self, name) for name in type(self)._fields}
        phases = [
            {"name": one.name, "begin_s": round(one.begin_s, 3), "end_s": round(one.end_s, 3)}
            for one in self.phases
        ]
        seconds = {name: round(values[name], 3) for name in ("seconds", "began_s")}
        return {**values, **seconds, "phases": phases}


def shortened(lines: Iterable[str]) -> tuple[str, ...]:
    """Return the last MAX_LINES of ``lines``, each cut after MAX_LINE characters."""
    return tuple(
        line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."
        for line in list(lines)[-MAX_LINES:]
    )


def badness(result: RunResult) -> tuple[int, int]:
    """Return a sort key: the worse ``result`` is, the smaller.  Runs that were not run come behind
    those that failed."""
    if result.is_ok:
        return len(BADNESS) + 2, 0
    if result.verdict == NOT_RUN:
        return len(BADNESS) + 1, 0
    status = result.exit_status
    if status in BADNESS:
        return BADNESS.index(status), 0
    return len(BADNESS), -status


def worst_status(results: Iterable[RunResult]) -> int:
    """Return the exit status of the worst of ``results``; 0 if all are well."""
    failed = [result for result in results if not result.is_ok]
    if not failed:
        return 0
    return min(failed, key=badness).exit_status or HOST_STATUS
