"""The result of a run, and which of several is the worst."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyvmm.startup.types import Record
from pyvmm.testing.boot_result import BootResult
from pyvmm.testing.own_verdicts import PASSED
from pyvmm.testing.timeline import Phase
from pyvmm.testing.verdicts import HOST_STATUS

NOT_STARTED = "not-started"
"""The verdict on a run that was not begun, because the matrix was interrupted."""
HOST_ERROR = "host-error"
"""The verdict on a run that could not be done, such as one without a log directory."""
INTERRUPTED_STATUS = 130
BADNESS = (INTERRUPTED_STATUS, HOST_STATUS, 123, 122, 121, 120, 124)
"""Exit statuses from the worst on.  Behind them stand the commands' own, the highest first, then
0: a command that fails has at least been run."""
MAX_LINE, MAX_LINES = 400, 40
"""The most characters of a line, and the most lines, that a result quotes of a console."""


class RunResult(Record):
    """The end of a run.

    ``verdict`` is one of the names above or of those of a boot test (docs/verdicts.md).  ``line``
    is the line of the console that decided, ``before`` the lines before it, ``parts`` are other
    lines with titles.  ``problems`` tell of logs that could not be written, ``logs`` are the names
    of those that are there.  ``where`` is the worker, "" for this host.  ``began_s`` counts from
    the start of the matrix.  ``test`` is all that the boot test told, None if there was none.
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
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    problems: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    test: BootResult | None = None

    @property
    def is_ok(self) -> bool:
        """True if the run did what it should."""
        return self.verdict == PASSED

    @property
    def is_done(self) -> bool:
        """True unless the run was not begun."""
        return self.verdict != NOT_STARTED

    def as_json(self) -> dict[str, Any]:
        """Return the facts as JSON has them, without the boot test's."""
        names = ("name", "verdict", "exit_status", "message", "line", "where", "problems", "logs")
        return {
            **{name: getattr(self, name) for name in names},
            "seconds": round(self.seconds, 3), "began_s": round(self.began_s, 3),
            "phases": [
                {"name": one.name, "begin_s": one.begin_s, "end_s": one.end_s}
                for one in self.phases
            ],
        }


def not_started(name: str, problem: str = "") -> RunResult:
    """Return the result of a run that was not begun, because of ``problem`` or an interrupt."""
    return RunResult(
        name=name, verdict=NOT_STARTED, exit_status=INTERRUPTED_STATUS,
        message=problem or "not run: the matrix was interrupted before",
    )


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
    if not result.is_done:
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
