"""How a run ended: one typed outcome, one exit status.  docs/architecture.md has the table."""

from __future__ import annotations

from pyvmm.startup.types import Record, StrEnum


class Kind(StrEnum):
    """Every way a run can end."""

    GUEST_STATUS = "guest reported a status"
    RESET = "guest rebooted"
    SHUTDOWN = "guest shut down"
    POWER_OFF = "guest powered off"
    SILENT_HALT = "guest halted without a word"
    EARLY_HALT = "guest halted before it started an init"
    EARLY_RESET = "guest rebooted before it started an init"
    GAVE_UP = "the boot gave up early"
    QUIT = "quit at the console"
    STOPPED = "stopped by the script"
    PANIC = "kernel panic"
    TRIPLE_FAULT = "triple fault"
    INTERNAL_ERROR = "KVM internal error"
    TIMEOUT = "timeout"
    HOST_ERROR = "host error"
    SIGNAL = "stopped by a signal"


MAYBE_SILENT = (
    Kind.PANIC, Kind.TIMEOUT, Kind.TRIPLE_FAULT, Kind.SILENT_HALT, Kind.SHUTDOWN, Kind.RESET,
    Kind.EARLY_HALT, Kind.EARLY_RESET, Kind.GAVE_UP, Kind.QUIT, Kind.SIGNAL,
)
"""Ends that need an explanation if the guest printed nothing, and some of them in any case.
``verdict.Evidence.wants_explanation`` decides."""
MAX_GUEST_STATUS = 119
_FIXED_STATUS = {
    Kind.RESET: 0,
    Kind.SHUTDOWN: 0,
    Kind.POWER_OFF: 0,
    Kind.QUIT: 0,
    Kind.STOPPED: 0,
    Kind.PANIC: 121,
    Kind.SILENT_HALT: 121,
    Kind.EARLY_HALT: 121,
    Kind.EARLY_RESET: 121,
    Kind.GAVE_UP: 121,
    Kind.TRIPLE_FAULT: 122,
    Kind.INTERNAL_ERROR: 123,
    Kind.TIMEOUT: 124,
    Kind.HOST_ERROR: 125,
}


class Outcome(Record, kw_only=False):
    """One way a run ended.

    ``value`` is the byte the guest reported (GUEST_STATUS) or the signal number (SIGNAL);
    ``detail`` is text for a person: the panic line, the registers, the error.
    """

    kind: Kind
    value: int = 0
    detail: str = ""

    def __post_init__(self) -> None:
        # The member itself: the code compares with `is`, and a pickled kind is another text.
        object.__setattr__(self, "kind", Kind(self.kind))

    @property
    def exit_status(self) -> int:
        """Return the exit status: 0-119 from the guest, 121-125 by kind, 128+n by signal."""
        if self.kind is Kind.GUEST_STATUS:
            return min(self.value, MAX_GUEST_STATUS)
        if self.kind is Kind.SIGNAL:
            return 128 + self.value
        return _FIXED_STATUS[self.kind]

    def __str__(self) -> str:
        text: str = self.kind
        if self.kind is Kind.GUEST_STATUS:
            text += f" {self.value}"
            if self.value > MAX_GUEST_STATUS:
                text += f" (over {MAX_GUEST_STATUS}, so the exit status is {MAX_GUEST_STATUS})"
        elif self.kind is Kind.SIGNAL:
            text += f" ({self.value})"
        return f"{text}: {self.detail}" if self.detail else text
