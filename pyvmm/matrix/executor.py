"""The contract of an executor, and the events that it tells of its runs.

    start(runs, tell) -> tell(Started), tell(PhaseBegan)..., tell(Finished), ... -> tell(Done)
    stop()            -> no further run starts, and those under way end soon
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pyvmm.matrix.results import RunResult
from pyvmm.matrix.runs import Run
from pyvmm.startup.types import Protocol, Record


class Started(Record):
    """Run ``name`` has begun, on worker ``where``; "" is this host."""

    name: str
    where: str = ""


class PhaseBegan(Record):
    """A phase of run ``name`` has begun."""

    name: str
    phase: str


class Finished(Record):
    """A run has ended."""

    result: RunResult


class Done(Record):
    """The executor has no run under way and starts none; ``problem`` says why it gave up."""

    problem: str = ""


Event = Started | PhaseBegan | Finished | Done


class Watch:
    """The link between a run and whoever may end it."""

    def __init__(self, on_phase: Callable[[str], None]) -> None:
        self.on_phase = on_phase
        self._lock = threading.Lock()
        self._is_stopped = False
        self._end: Callable[[], object] | None = None

    @property
    def is_stopped(self) -> bool:
        """True once the run must end."""
        return self._is_stopped

    def adopt(self, end: Callable[[], object]) -> None:
        """Have ``end`` called, in another thread, if the run must end; at once if it must now."""
        with self._lock:
            self._end = end
            is_late = self._is_stopped
        if is_late:
            end()

    def stop(self) -> None:
        """End the run; idempotent."""
        with self._lock:
            end = None if self._is_stopped else self._end
            self._is_stopped = True
        if end is not None:
            end()


Runner = Callable[[Run, str, Watch], RunResult]
"""Does one run: its logs go into the directory, which is there.  PyvmmError or OSError if it could
not be run."""


class Executor(Protocol):
    """Does runs, several at a time, in threads or processes of its own."""

    def start(self, runs: Sequence[Run], tell: Callable[[Event], None]) -> None:
        """Begin; ``tell`` may be called in any thread."""

    def stop(self) -> None:
        """Start no further run, end those under way, and return without waiting for them."""

    def close(self) -> None:
        """Give back what the executor holds."""
