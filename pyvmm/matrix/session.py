"""Have all runs done, show what goes on, and know how each ended, also if somebody interrupts."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence

from pyvmm.matrix.executor import Done, Event, Executor, Finished, PhaseBegan, Started
from pyvmm.matrix.interrupts import interrupts
from pyvmm.matrix.progress import Progress
from pyvmm.matrix.results import INTERRUPTED_STATUS, RunResult, not_started
from pyvmm.matrix.runs import Run
from pyvmm.startup.types import Record
from pyvmm.testing.own_verdicts import INTERRUPTED

STOP_S = 30.0
"""How long runs may take to end after an interrupt."""


class Interrupted(Record):
    """Somebody sent the signal ``number``."""

    number: int


class Session:
    """The runs of a matrix while they are done.

    ``on_result`` gets each result as it comes, in the caller's thread.
    """

    def __init__(
        self, runs: Sequence[Run], executor: Executor, progress: Progress,
        on_result: Callable[[RunResult], None],
    ) -> None:
        self._runs = runs
        self._executor = executor
        self._progress = progress
        self._on_result = on_result
        self._events: queue.SimpleQueue[Event | Interrupted] = queue.SimpleQueue()
        self._results: dict[str, RunResult] = {}
        self._started_s: dict[str, float] = {}
        self._began_s = 0.0
        self._until_s: float | None = None
        self.signal = 0
        """The first signal that came, 0 if none did."""
        self.problem = ""
        """The executor's reason to give up, "" if it did not."""

    def run(self) -> list[RunResult]:
        """Do all runs; return their results in the order of the runs."""
        self._began_s = time.monotonic()
        with interrupts(lambda number: self._events.put(Interrupted(number=number))):
            try:
                self._executor.start(self._runs, self._events.put)
                while not self._is_over():
                    pass
            finally:
                self._executor.close()
        for run in self._runs:
            if run.name not in self._results:
                self._results[run.name] = self._missing(run)
        return [self._results[run.name] for run in self._runs]

    def _is_over(self) -> bool:
        """Wait for an event and act on it; return True if it was the last."""
        wait_s = self._progress.refresh_s
        try:
            event = self._events.get(timeout=wait_s)
        except queue.Empty:
            self._progress.refresh()
            return self._until_s is not None and time.monotonic() > self._until_s
        match event:
            case Started(name=name, where=where):
                if name in self._started_s:
                    self._progress.note(f"{name} begins again, on {where}: its worker is gone")
                self._started_s[name] = time.monotonic() - self._began_s
                self._progress.started(name, where)
            case PhaseBegan(name=name, phase=phase):
                self._progress.phase_began(name, phase)
            case Finished(result=result):
                self._finished(result)
            case Done(problem=problem):
                self.problem = problem
                return True
            case Interrupted(number=number):
                return self._interrupted(number)
        return False

    def _finished(self, result: RunResult) -> None:
        began_s = self._started_s.get(result.name, 0.0)
        result = result.replace(began_s=began_s)
        self._results[result.name] = result
        self._progress.finished(result)
        self._on_result(result)

    def _interrupted(self, number: int) -> bool:
        """End all runs; return True if this is the second time, so that nobody waits for them."""
        if self.signal:
            self._progress.note("leaving the runs that have not ended yet")
            return True
        self.signal = number
        self._until_s = time.monotonic() + STOP_S
        self._progress.note("ending all runs; the report comes then (again: at once)")
        self._executor.stop()
        return False

    def _missing(self, run: Run) -> RunResult:
        """Return the result of a run that has none."""
        if run.name in self._started_s:
            return RunResult(
                name=run.name, verdict=INTERRUPTED, exit_status=INTERRUPTED_STATUS,
                message=self.problem or "ended by an interrupt",
                began_s=self._started_s[run.name],
            )
        return not_started(run.name, self.problem)
