"""Verdicts of a boot test that are no exception's: about its command, its files, its console."""

from __future__ import annotations

import signal

from pyvmm.launcher.completed import Completed
from pyvmm.run.outcome import MAX_GUEST_STATUS
from pyvmm.testing.verdicts import TIMEOUT_STATUS

PASSED = "passed"
FAILED = "failed"
"""The command ended with another status than 0, or was killed by a signal."""
TIMED_OUT = "command-timeout"
NOT_RUN = "not-run"
"""The command is not there, or is no program."""
EXPECT = "expect"
"""The console did not show what it must."""
COPY = "copy"
"""A file could not be put or fetched."""
INTERRUPTED = "interrupted"
OWN_VERDICTS = (PASSED, FAILED, TIMED_OUT, NOT_RUN, EXPECT, COPY, INTERRUPTED)

NOT_EXECUTABLE_STATUS, NOT_FOUND_STATUS = 126, 127


class Failed(Exception):  # noqa: N818 - caught by the test that raises it
    """The test failed with ``verdict``, one of OWN_VERDICTS."""

    def __init__(self, verdict: str, exit_status: int, message: str) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.exit_status = exit_status


def check_completed(completed: Completed, what: str, timeout_s: float) -> None:
    """Raise Failed unless the command, called ``what``, ended with status 0 in its time."""
    if completed.timed_out:
        raise Failed(TIMED_OUT, TIMEOUT_STATUS, f"{what}: killed after {timeout_s:g} s (--timeout)")
    if completed.signal is not None:
        raise Failed(
            FAILED, MAX_GUEST_STATUS,
            f"{what}: killed by signal {completed.signal} ({_name(completed.signal)}); exit status "
            f"{MAX_GUEST_STATUS} stands for it",
        )
    if completed.status:
        is_over = completed.status > MAX_GUEST_STATUS
        raise Failed(
            FAILED, min(completed.status, MAX_GUEST_STATUS),
            f"{what}: exit status {completed.status}"
            + (f"; {MAX_GUEST_STATUS} stands for all above it" if is_over else ""),
        )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "no signal of this host's"
