"""Binds a machine in a process of its own to a judge: a bad line ends every wait."""

from __future__ import annotations

import threading

from pyvmm.errors import PyvmmError
from pyvmm.run.outcome import Outcome
from pyvmm.startup.types import TYPE_CHECKING, Protocol
from pyvmm.testing.fail_on import FAIL_ON, FailOn
from pyvmm.testing.line_judge import TRACE_S, Finding, LineJudge
from pyvmm.testing.verdicts import BootError, error_of_outcome

if TYPE_CHECKING:
    from collections.abc import Callable


class WatchedVm(Protocol):
    """The part of a Vm that ``watch`` needs."""

    def on_output(self, callback: Callable[[bytes], object]) -> object:
        """Call ``callback`` with what the guest prints, from the first byte on."""

    def fail(self, error: PyvmmError) -> None:
        """Stop the machine; every call that waits, now or later, raises ``error``."""

    def on_end(self, callback: Callable[[Outcome], object]) -> object:
        """Call ``callback`` once, behind the last line of the console."""


class Watch:
    """Fails a Vm at the first bad line of its console, and at an end that nobody announced.

    ``error`` is the verdict, None as long as there is none.
    """

    def __init__(self, vm: WatchedVm, fail_on: FailOn = FAIL_ON) -> None:
        self._vm = vm
        self._is_end_expected = False
        self._timer: threading.Timer | None = None
        self.error: BootError | None = None
        self.judge = LineJudge(self._on_verdict, fail_on=fail_on, on_suspect=self._on_suspect)
        vm.on_output(self.judge.feed)
        vm.on_end(self._on_end)

    def expect_end(self, is_expected: bool = True) -> None:
        """Announce that the guest may end now, by a power-off, a reboot or ``vm.stop()``."""
        self._is_end_expected = is_expected

    def boot_is_over(self) -> None:
        """See ``LineJudge.boot_is_over``."""
        self.judge.boot_is_over()

    def check(self) -> None:
        """Raise the verdict, if there is one.  A call trace that still comes is not awaited."""
        self.judge.end()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Leave no timer and no thread behind; idempotent.  Not in a callback of the judge."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def _on_suspect(self) -> None:
        self._timer = timer = threading.Timer(TRACE_S, self.judge.end)
        timer.name, timer.daemon = "pyvmm-trace", True
        timer.start()

    def _on_verdict(self, finding: Finding) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fail(finding.error())

    def _on_end(self, outcome: Outcome) -> None:
        self.judge.end()
        if self.error is not None:
            self.error.outcome = self.error.outcome or outcome
            return
        error = error_of_outcome(outcome, self.judge.last_lines)
        if not (self._is_end_expected and error.name in ("ended", "boot-failed")):
            self._fail(error)

    def _fail(self, error: BootError) -> None:
        self.error = self.error or error
        self._vm.fail(self.error)


def watch(vm: WatchedVm, fail_on: FailOn = FAIL_ON) -> Watch:
    """Return the Watch of ``vm``; call it right after the start, before the first line is lost."""
    return Watch(vm, fail_on)
