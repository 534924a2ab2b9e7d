"""The moments of one boot test, and the phases between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyvmm.console.output import LineWatch
from pyvmm.console.watch import texts
from pyvmm.startup.types import Record

PHASES = ("start", "kernel", "user space", "agent", "command")
"""The process and its machine; the kernel's boot; from its init on, if it says when it starts one;
from the agent's hello, with the files that are put; the command."""
_RUNS, _AS_INIT = b"Run ", b" as init process"


class Phase(Record):
    """A part of the test, in seconds from its start."""

    name: str
    begin_s: float
    end_s: float


class Timeline:
    """Notes when each phase begins; ``on_phase`` is called with its name."""

    def __init__(self, on_phase: Callable[[str], object] | None = None) -> None:
        self._on_phase = on_phase
        self._start_s = time.monotonic()
        self._lock = threading.Lock()
        self._begins: list[tuple[str, float]] = []
        self._end_s: float | None = None
        self._lines = LineWatch(self._look)
        self.began_at_s = time.time()
        """The start on the wall clock, a Unix time."""
        self.begin("start")

    def now_s(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start_s

    def begin(self, name: str) -> None:
        """Note that a phase begins.  A phase behind it may have begun already: then not."""
        at = PHASES.index(name)
        with self._lock:  # the console's thread and the test's both call
            if self._begins and PHASES.index(self._begins[-1][0]) >= at:
                return
            self._begins.append((name, self.now_s()))
        if self._on_phase is not None:
            self._on_phase(name)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the console, where the kernel tells that it starts an init."""
        if self._begins[-1][0] == "kernel":
            self._lines.feed(data)

    def end(self) -> None:
        """End the last phase; idempotent."""
        if self._end_s is None:
            self._end_s = self.now_s()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the phases so far, in order."""
        last_s = self._end_s if self._end_s is not None else self.now_s()
        ends = [*(begin_s for _, begin_s in self._begins[1:]), last_s]
        return tuple(
            Phase(name=name, begin_s=round(begin_s, 3), end_s=round(max(begin_s, end_s), 3))
            for (name, begin_s), end_s in zip(self._begins, ends, strict=True)
        )

    def _look(self, line: bytes) -> None:
        if any(text.startswith(_RUNS) and text.endswith(_AS_INIT) for text in texts(line)):
            self.begin("user space")
