"""A limit on the work that untrusted data may cause: kernels, configurations, modules.

A limit on the output is not enough, because a file can be made of parts that take long and yield
nothing.  The reader of such a file spends from a ``Budget``.  It counts steps, which are the same
everywhere, and time, because one call of a C library may take much longer than another.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.errors import PyvmmError

MAX_STEPS = 6_000_000
"""A step is the work of about a microsecond: one sequence of LZ4, one part of a file.  The largest
kernels that are looked into take 5 million."""
MAX_CPU_S = 5.0
"""CPU time of this thread, on a machine as fast as the one on which REFERENCE_S was measured."""
PATIENT_CPU_S = 60.0
"""CPU time of work that is done once, after a download."""
EXPLAIN_S = 3.0
"""Time on the clock for explanations around a run, because a person waits for the prompt."""

LOOK_STEPS = 256
"""Steps between two looks at the clocks, and the cost of one call of a C library."""
REFERENCE_S = 0.0006
_REFERENCE_LOOPS = 20_000
_TRIES = 3


class WorkError(PyvmmError):
    """The budget is spent; the text has no subject."""


class Budget:
    """The work that may still be done.  ``spend`` raises WorkError once it is too much.

    ``cpu_s`` and ``wall_s`` are seconds of this thread and of the clock, from now on.  They
    count on the reference machine: a slower one, such as an emulated one, has more.  None is no
    limit.
    """

    def __init__(
        self,
        *,
        steps: int = MAX_STEPS,
        cpu_s: float = MAX_CPU_S,
        wall_s: float | None = None,
        cpu_clock: Callable[[], float] = time.thread_time,
        wall_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps_left = steps
        self.cpu_s = cpu_s
        self._steps = steps
        self._wall_s = wall_s
        self._cpu_clock = cpu_clock
        self._wall_clock = wall_clock
        self._cpu_start_s = cpu_clock()
        self._wall_start_s = wall_clock()
        self._slowness = 0.0
        self._unlooked_steps = 0

    def spend(self, steps: int = 1) -> None:
        """Account for ``steps`` of work that were done, some milliseconds' at most."""
        self.steps_left -= steps
        if self.steps_left < 0:
            raise WorkError(f"takes more than the limit of {self._steps} steps of work")
        self._unlooked_steps += steps
        if self._unlooked_steps >= LOOK_STEPS:
            self._unlooked_steps = 0
            self.look()

    def look(self) -> None:
        """Look at the clocks."""
        cpu_s = self._cpu_clock() - self._cpu_start_s
        if cpu_s > self.cpu_s and cpu_s > self.cpu_s * self.slowness():
            raise WorkError(f"takes more than the limit of {self.cpu_s:g} s of CPU time")
        if self.is_late():
            raise WorkError(f"takes more than the limit of {self._wall_s:g} s")

    def is_late(self) -> bool:
        """True if ``wall_s`` have passed."""
        if self._wall_s is None:
            return False
        wall_s = self._wall_clock() - self._wall_start_s
        return wall_s > self._wall_s and wall_s > self._wall_s * self.slowness()

    def slowness(self) -> float:
        """Return how many times slower than the reference this machine is, at least 1.0."""
        if not self._slowness:
            fastest_s = min(_loop_s() for _ in range(_TRIES))
            self._slowness = max(1.0, fastest_s / REFERENCE_S)
        return self._slowness


def _loop_s() -> float:
    """Return the CPU time of a loop that measures this machine."""
    start_s = time.thread_time()
    for _ in range(_REFERENCE_LOOPS):
        pass
    return time.thread_time() - start_s
