"""Gathers all that a failed test needs: outcome, lines, the kernel's log, registers.

All is gathered from a Vm that may be dead, hang or lie: each part has a time limit, and a part that
cannot be had is left out.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Sequence

from pyvmm.errors import PyvmmError
from pyvmm.launcher.vm import Vm
from pyvmm.run.outcome import Kind
from pyvmm.startup.types import Record
from pyvmm.testing.kernel_log import KernelMessage, kernel_messages, warnings_of
from pyvmm.testing.line_judge import LINES_BEFORE, shown_line
from pyvmm.testing.verdicts import BootError

LOG_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 10.0
PAUSE_TIMEOUT_S = 5.0
MAX_WARNINGS = 200
LINE_COLUMNS = 96


class FailureReport(Record):
    """The parts of a report, in escaped lines."""

    verdict: str
    outcome: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    line: str = ""
    trace: tuple[str, ...] = ()
    console: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    registers: tuple[str, ...] = ()

    def sections(self) -> list[tuple[str, str]]:
        """Return the titled parts, without those that are empty."""
        parts: tuple[tuple[str, Sequence[str]], ...] = (
            ("outcome", self.outcome),
            ("console, with the line that decided", (
                *self.before, f"> {self.line}", *self.trace) if self.line else ()),
            ("last lines of the console", self.console),
            ("kernel log, warn and worse", self.warnings),
            ("registers", self.registers),
        )
        return [(title, "\n".join(lines)) for title, lines in parts if lines]

    def text(self) -> str:
        """Return the whole report."""
        parts = [f"{title}:\n{text}" for title, text in self.sections()]
        return "\n\n".join([self.verdict, *parts])


def failure_report(vm: Vm, error: BaseException | None = None) -> FailureReport:
    """Return the report of a test that failed with ``error``; the machine may run on.

    The kernel's log is read while the agent lives, the registers while the machine is paused (it
    is resumed) or after its end.
    """
    bad = error if isinstance(error, BootError) else vm.failure
    found = bad if isinstance(bad, BootError) else BootError("")
    warnings = warnings_of(read_kernel_log(vm)) if vm.failure is None else ()
    outcome = vm.outcome if vm.failure is None else vm.wait(STOP_TIMEOUT_S)
    outcome = outcome or found.outcome
    if bad is not None and outcome is not None and outcome.kind is Kind.STOPPED:
        outcome = None  # because of the line, which says more
    return FailureReport(
        verdict=f"{found.name}: {found}" if str(found) else "",
        outcome=tuple(map(shown_line_of, str(outcome).split("\n"))) if outcome else (),
        before=found.before, line=found.line, trace=found.trace,
        console=last_lines(vm.console.text),
        warnings=warnings[-MAX_WARNINGS:],
        registers=read_registers(vm),
    )


def last_lines(text: str, count: int = LINES_BEFORE) -> tuple[str, ...]:
    """Return the last lines of a console, escaped."""
    return tuple(map(shown_line_of, text[-count * 1024 :].rstrip().split("\n")[-count:]))


def shown_line_of(text: str) -> str:
    """Return ``text`` as ``shown_line`` does."""
    return shown_line(text.encode("utf-8", "backslashreplace"))


def read_kernel_log(vm: Vm) -> list[KernelMessage]:
    """Return the kernel's log, read by the agent; nothing if that fails or takes too long."""
    with contextlib.suppress(PyvmmError, RuntimeError, OSError):
        return kernel_messages(vm.read("/dev/kmsg", timeout_s=LOG_TIMEOUT_S))
    return []


def read_registers(vm: Vm, cpus: int = 1) -> tuple[str, ...]:
    """Return the registers of the first ``cpus`` vCPUs in lines; nothing if that fails."""
    lines: list[str] = []
    with contextlib.suppress(PyvmmError, RuntimeError, OSError):
        is_ours = vm.outcome is None and not vm.is_paused
        if is_ours and not vm.pause(PAUSE_TIMEOUT_S):
            return ()
        try:
            for number in range(cpus):
                lines += [f"vcpu{number}:", *_wrapped(str(vm.registers(number)))]
        finally:
            if is_ours and vm.outcome is None:
                vm.resume()
    return tuple(lines)


def _wrapped(registers: str) -> list[str]:
    """Return the registers' text in lines; none begins with a value."""
    bound = registers.replace(" 0x", "\xa00x").replace(" (", "\xa0(")
    return [line.replace("\xa0", " ") for line in textwrap.wrap(bound, LINE_COLUMNS)]
