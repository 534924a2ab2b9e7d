"""The standard output and error of ``pyvmm test``: the command's bytes, and lines of ours."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping

from pyvmm.console.output import LineWatch
from pyvmm.launcher.vm import Vm
from pyvmm.report import MAX_LINE, escape
from pyvmm.testing.annotations import Fence, annotation, defused, is_wanted
from pyvmm.testing.boot_result import BootResult
from pyvmm.testing.line_judge import shown_line
from pyvmm.testing.passed_on import PassedOn
from pyvmm.testing.verdicts import HOST_STATUS

MAX_PART_LINES = 100
"""Of each part of a failure's report so many lines are shown: the reports have all."""
END_PATIENCE_S = 5.0
_OF_THE_COMMAND = ("failed", "not-run", "copy")
_HANGS = ("boot-timeout", "run-timeout", "command-timeout", "agent-lost", "lockup", "expect")
"""Verdicts on a guest whose registers tell where it is."""


class TestOutput:
    """A context manager: inside it, no line of the guest's is a command to GitHub's runner.

    The command's standard output is never mixed with lines of ours, which go to standard error.
    """

    __test__ = False  # pytest collects what begins with Test

    def __init__(self, environment: Mapping[str, str], *, shows_console: bool) -> None:
        self._vm: Vm | None = None
        self._end_s: float | None = None
        self._out = PassedOn(1, gives_up=self._is_over)
        self._err = PassedOn(2, gives_up=self._is_over)
        self._lines = PassedOn(2, is_terminal=False, gives_up=self._is_over)
        self._console = LineWatch(self._show_console) if shows_console else None
        self._fence = Fence(self._say) if is_wanted(environment) else None
        self._defused = defused if self._fence is not None else str
        self.console_bytes = 0
        """The number of bytes that the guest has printed."""

    def __enter__(self) -> TestOutput:
        if self._fence is not None:
            self._fence.__enter__()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._fence is not None:
            self._fence.open()

    def watch(self, vm: Vm) -> None:
        """Give up readers that take nothing once ``vm`` has ended."""
        self._vm = vm

    def console(self, data: bytes) -> None:
        """Take what the guest prints."""
        self.console_bytes += len(data)
        if self._console is not None:
            self._console.feed(data)

    def stdout(self, data: bytes) -> None:
        """Take the command's standard output."""
        self._out.write(data)

    def stderr(self, data: bytes) -> None:
        """Take the command's standard error."""
        self._err.write(data)

    def complain(self, line: str) -> None:
        """Print one line of ours, which may quote anybody."""
        self._say(f"pyvmm: {self._defused(escape(line)[:MAX_LINE])}")

    def finish(self, result: BootResult, complaints: list[str]) -> int:
        """Print the verdict, and all around it if the test failed; return the exit status.

        ``complaints`` are lines about reports that could not be written.  With one of them, or with
        output that is lost, a test that passed is no success: HOST_STATUS.
        """
        self._end_s = time.monotonic()
        complaints = [*self._end_streams(), *complaints]
        status = HOST_STATUS if complaints and result.is_passed else result.exit_status
        times = ", ".join(
            f"{phase.name} {phase.end_s - phase.begin_s:.1f} s" for phase in result.phases
        )
        lines = [] if result.is_passed else _parts(result)
        for title, part in lines:
            self.complain(f"{title}:")
            left_out = max(0, len(part) - MAX_PART_LINES)
            if left_out:
                self._say(f"  ({left_out} lines are left out)")
            for line in part[left_out:]:
                self._say(f"  {self._defused(escape(line)[:MAX_LINE])}")
        for line in (*(result.problems if result.is_passed else ()), *complaints):
            self.complain(line)
        verdict = "" if result.is_passed else f"{result.verdict}: "
        self.complain(f"{verdict}{result.message}{f' ({times})' if times else ''}")
        if status:
            self.complain(f"exit status {status}")
        if status and self._fence is not None and self._fence.is_open:
            text = "\n".join(
                [result.message, *complaints, *(self._defused(line) for line in result.before[-5:])]
            )
            self._say(annotation("error", text, title=f"pyvmm test: {result.verdict}"))
        return status

    def _end_streams(self) -> list[str]:
        """End the command's streams, let the runner obey again; return the complaints."""
        complaints = []
        for name, passed_on in (("output", self._out), ("error", self._err)):
            passed_on.end()
            problem = passed_on.problem
            if problem is not None and problem.errno != errno.EPIPE:
                complaints.append(f"standard {name}: {problem.strerror}")
        if not self._out.line_ended or not self._err.line_ended:
            self._say("")
        if self._fence is not None:
            self._fence.open()
        return complaints

    def _show_console(self, line: bytes) -> None:
        self._say(f"console: {self._defused(shown_line(line))}")

    def _say(self, line: str) -> None:
        self._lines.write(f"{line}\n".encode("utf-8", "backslashreplace"))

    def _is_over(self) -> bool:
        if self._end_s is not None:
            return time.monotonic() - self._end_s > END_PATIENCE_S
        return self._vm is not None and (
            self._vm.failure is not None or self._vm.outcome is not None
        )


def _parts(result: BootResult) -> list[tuple[str, tuple[str, ...]]]:
    """Return the parts of a failure's report for a person, in order."""
    parts = []
    for title, lines in result.sections():
        # A command's failure is explained by its own output, which was shown.
        is_needless = result.verdict in _OF_THE_COMMAND and title != "also"
        if title == "registers":
            is_needless = result.verdict not in _HANGS
        if not is_needless:
            parts.append((title, tuple(lines)))
    return parts
