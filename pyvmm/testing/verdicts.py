"""The verdicts on a guest: one exception class each, with its name and its exit status.

Names are those that a test writes, ``pytest.raises(pyvmm.KernelPanic)``: nouns, without "Error".
docs/verdicts.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pyvmm.errors import PyvmmError
from pyvmm.report import escape
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import ClassVar

    Arguments = tuple[str, Outcome | None, str, tuple[str, ...], tuple[str, ...], str]

ENDED_STATUS = 120
BAD_GUEST_STATUS = 121
TRIPLE_FAULT_STATUS = 122
INTERNAL_ERROR_STATUS = 123
TIMEOUT_STATUS = 124
HOST_STATUS = 125
_WAITED = re.compile(r"^(agent\.wait: )?no agent came forward within [0-9.]+ s: ")


class BootError(PyvmmError):
    """Base of the verdicts.

    ``message`` is the first line of the error.  ``outcome`` is the end of the run, None if it was
    not over yet.  ``line`` is the console's line that decided, "" if none; ``before`` holds up to
    40 lines before it, ``trace`` those behind it.  ``report`` is a longer text for people, set by
    whoever asks the guest for more.  All lines are escaped already.
    """

    name: ClassVar[str] = "failed"
    exit_status: ClassVar[int] = BAD_GUEST_STATUS

    def __init__(
        self,
        message: str,
        outcome: Outcome | None = None,
        line: str = "",
        before: Sequence[str] = (),
        trace: Sequence[str] = (),
        report: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.outcome = outcome
        self.line = line
        self.before = tuple(before)
        self.trace = tuple(trace)
        self.report = report

    def __reduce__(self) -> tuple[type[BootError], Arguments]:
        # To be sent between processes, by pytest-xdist or Dask.
        return type(self), (
            self.message, self.outcome, self.line, self.before, self.trace, self.report,
        )


class KernelPanic(BootError):
    """The kernel panicked."""

    name = "panic"


class KernelOops(BootError):
    """The kernel told of a bug of its own: an oops, ``BUG:``, KASAN, UBSAN and their like."""

    name = "oops"


class KernelWarning(BootError):
    """The kernel printed ``WARNING:``."""

    name = "warning"


class Lockup(BootError):
    """A CPU or a task hangs: soft or hard lockup, RCU stall, hung task, workqueue lockup."""

    name = "lockup"


class RootNotMounted(BootError):
    """The root file system could not be mounted."""

    name = "root"


class BootFailed(BootError):
    """The kernel gave up, halted or rebooted before it started an init."""

    name = "boot-failed"


class TripleFault(BootError):
    """The guest's CPU shut down after a third fault."""

    name = "triple-fault"
    exit_status = TRIPLE_FAULT_STATUS


class InternalError(BootError):
    """KVM could not go on."""

    name = "internal-error"
    exit_status = INTERNAL_ERROR_STATUS


class BootTimeout(BootError):
    """The guest was not ready in time."""

    name = "boot-timeout"
    exit_status = TIMEOUT_STATUS


class RunTimeout(BootError):
    """The test took longer than it may."""

    name = "run-timeout"
    exit_status = TIMEOUT_STATUS


class GuestEnded(BootError):
    """The guest ended without a report, however clean: power-off, reboot, a halt."""

    name = "ended"
    exit_status = ENDED_STATUS


class FailedOn(BootError):
    """A line of the console matched a pattern of the user's."""

    name = "fail-on"


class AgentLost(BootError):
    """The guest runs, but its agent never came, hung up or broke its protocol."""

    name = "agent-lost"
    exit_status = HOST_STATUS


class RunFailed(BootError):
    """The host could not go on, or the process of the machine was ended by somebody else."""

    name = "host-error"
    exit_status = HOST_STATUS


VERDICTS: tuple[type[BootError], ...] = (
    KernelPanic, KernelOops, KernelWarning, Lockup, RootNotMounted, BootFailed, TripleFault,
    InternalError, BootTimeout, RunTimeout, GuestEnded, FailedOn, AgentLost,
    RunFailed,
)

_BY_KIND: dict[str, type[BootError]] = {
    Kind.PANIC: KernelPanic,
    Kind.TRIPLE_FAULT: TripleFault,
    Kind.INTERNAL_ERROR: InternalError,
    Kind.TIMEOUT: RunTimeout,
    Kind.GAVE_UP: BootFailed,
    Kind.EARLY_HALT: BootFailed,
    Kind.EARLY_RESET: BootFailed,
    Kind.SILENT_HALT: BootFailed,
    Kind.HOST_ERROR: RunFailed,
    Kind.SIGNAL: RunFailed,
    Kind.QUIT: RunFailed,
    Kind.STOPPED: RunFailed,
}
NO_ROOT_WORDS = ("VFS: Unable to mount root fs", "cannot mount the root")
"""A panic with one of these is about the root."""


def why_no_agent(error: PyvmmError) -> str:
    """Return why no agent came in time, without the words on how long was waited."""
    return _WAITED.sub("", str(error))


def error_of_outcome(outcome: Outcome, before: Sequence[str] = ()) -> BootError:
    """Return the verdict on a run that ended by ``outcome`` without a report.

    ``before`` are the last lines of the console.
    """
    kind = _BY_KIND.get(outcome.kind, GuestEnded)
    if kind is KernelPanic and any(words in outcome.detail for words in NO_ROOT_WORDS):
        kind = RootNotMounted
    text, *_ = str(outcome).split("\n")
    if kind is GuestEnded:
        has_told = outcome.kind is Kind.GUEST_STATUS
        how = "before the test was done" if has_told else "without a report"
        text = f"the guest ended {how}: {text}"
    return kind(escape(text), outcome, before=before)
