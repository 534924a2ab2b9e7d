"""The boot timer: a port where the guest marks how far it has come, and the times of the marks.

A byte written to the port is a mark.  ``Stage`` names the bytes that begin a stage of a run; every
other byte is the guest's own.  guest/exit/pyvmm-mark.c writes one for a shell script.  Times are
the host's CLOCK_BOOTTIME, by which the kernel also tells when a process was started.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from pyvmm.devices.byte_device import ByteDevice
from pyvmm.startup.types import IntEnum, Record

MAX_NS = (1 << 63) - 1
"""The latest time, and the highest count, that a state may have."""


class Stage(IntEnum):
    """Marks that begin a stage."""

    INIT = 1
    """The guest's first program runs: the kernel has booted."""
    USER_SPACE = 2
    """The system is set up: the guest's real work begins."""
    SHUTDOWN = 3
    """That work is done."""


_STAGE_NAMES = {
    Stage.INIT: "init",
    Stage.USER_SPACE: "user space",
    Stage.SHUTDOWN: "shutdown",
}


class Mark(Record, kw_only=False):
    """``value`` (0-255) was written when the clock stood at ``at_s``, in seconds."""

    value: int
    at_s: float


def boot_time_s() -> float:
    """Return CLOCK_BOOTTIME in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class BootTimer(ByteDevice):
    """A write-only port.  It keeps ``MAX_MARKS`` marks and counts the rest."""

    LENGTH = 1
    MAX_MARKS = 64

    def __init__(self, clock: Callable[[], float] = boot_time_s) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # several vCPUs may write
        self._marks: list[Mark] = []
        self._dropped = 0

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The marks so far, in the order of their times."""
        with self._lock:
            return tuple(self._marks)

    @property
    def dropped(self) -> int:
        """The number of marks that were not kept."""
        return self._dropped

    def save(self) -> dict[str, object]:
        """Return the marks, with times in ns (docs/architecture.md, "State")."""
        with self._lock:
            marks = [[mark.value, round(mark.at_s * 1e9)] for mark in self._marks]
            return {"marks": marks, "dropped": self._dropped}

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError.

        The times are those of the host on which the marks were made.
        """
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("boot timer", data)
        marks = fields.pairs("marks", self.MAX_MARKS, (0xFF, MAX_NS))
        dropped = fields.integer("dropped", 0, MAX_NS)
        fields.end()
        with self._lock:
            self._marks = [Mark(value, at_ns / 1e9) for value, at_ns in marks]
            self._dropped = dropped

    def read_byte(self, offset: int) -> int:
        """Write-only: reads as an unmapped port does."""
        return 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        """Mark the present moment with ``value``."""
        with self._lock:
            if len(self._marks) < self.MAX_MARKS:
                self._marks.append(Mark(value, self._clock()))
            else:
                self._dropped += 1


def timing_lines(
    marks: Iterable[Mark], *, process_start_s: float, guest_start_s: float, end_s: float
) -> list[str]:
    """Return the length of each stage of a run, a line each, for ``pyvmm run --timing``.

    Start-up is from ``process_start_s`` to ``guest_start_s``, when a vCPU first ran.  Then comes
    the kernel, up to the guest's first mark of a stage.  The last stage reached lasts until
    ``end_s``.  A stage that is begun twice has two lines.  All times are on one clock, in seconds.
    """
    begins = [("start-up", process_start_s), ("kernel", guest_start_s)]
    own = []
    for mark in marks:
        try:
            begins.append((_STAGE_NAMES[Stage(mark.value)], mark.at_s))
        except ValueError:
            own.append(mark)
    ends = [at_s for _, at_s in begins[1:]] + [end_s]
    lines = [
        f"{name:<10} {stop_s - at_s:9.3f} s, from {at_s - process_start_s:.3f} s"
        for (name, at_s), stop_s in zip(begins, ends, strict=True)
    ]
    lines += [f"{f'mark {mark.value}':<10} at {mark.at_s - process_start_s:.3f} s" for mark in own]
    lines.append(f"{'total':<10} {end_s - process_start_s:9.3f} s")
    return lines
