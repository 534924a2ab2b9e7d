"""Show how a matrix gets on, in lines on standard error; ``live`` has a table instead."""

from __future__ import annotations

import os
import time

from pyvmm.matrix.results import RunResult
from pyvmm.report import complain
from pyvmm.startup.types import Protocol
from pyvmm.testing.annotations import defused, is_wanted


class Progress(Protocol):
    """Told of everything that happens, in one thread."""

    refresh_s: float
    """How often ``refresh`` shall be called when nothing happens."""

    def started(self, name: str, where: str) -> None:
        """A run has begun."""

    def phase_began(self, name: str, phase: str) -> None:
        """A phase of a run has begun."""

    def finished(self, result: RunResult) -> None:
        """A run has ended."""

    def note(self, line: str) -> None:
        """Show ``line``."""

    def refresh(self) -> None:
        """Show how time passes."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def result_line(result: RunResult, done: int, count: int) -> str:
    """Return the line about a run that has ended."""
    width = len(str(count))
    where = f" on {result.where}" if result.where else ""
    message = f": {result.message}" if result.message and not result.is_ok else ""
    return (
        f"[{done:{width}}/{count}] {'ok  ' if result.is_ok else 'FAIL'} {result.name} "
        f"({result.seconds:.1f} s{where}){'' if result.is_ok else f' {result.verdict}'}{message}"
    )


class PlainProgress:
    """A line for each run that ends, and now and then one about the runs that take long."""

    refresh_s = 1.0
    _SILENCE_S = 60.0  # CI systems end jobs that say nothing

    def __init__(self, count: int) -> None:
        self._count = count
        self._done = 0
        self._running: dict[str, str] = {}
        self._said_s = time.monotonic()
        self._is_on_github = is_wanted(os.environ)

    def started(self, name: str, _where: str) -> None:
        """See ``Progress``."""
        self._running[name] = "start"

    def phase_began(self, name: str, phase: str) -> None:
        """See ``Progress``."""
        if name in self._running:
            self._running[name] = phase

    def finished(self, result: RunResult) -> None:
        """See ``Progress``."""
        self._running.pop(result.name, None)
        self._done += 1
        self._say(result_line(result, self._done, self._count))

    def note(self, line: str) -> None:
        """See ``Progress``."""
        self._say(f"pyvmm: {line}")

    def refresh(self) -> None:
        """See ``Progress``."""
        if time.monotonic() - self._said_s < self._SILENCE_S:
            return
        running = ", ".join(f"{name} ({phase})" for name, phase in self._running.items())
        self._say(f"[{self._done}/{self._count}] running: {running}")

    def close(self) -> None:
        """See ``Progress``."""

    def _say(self, line: str) -> None:
        self._said_s = time.monotonic()
        complain(defused(line) if self._is_on_github else line)
