"""The result of one boot test: plain values, for a command line, a matrix, JSON and JUnit."""

from __future__ import annotations

from pyvmm.errors import PyvmmError
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.types import TYPE_CHECKING, Record, name_of
from pyvmm.testing.expectations import Expected
from pyvmm.testing.junit import Case
from pyvmm.testing.own_verdicts import INTERRUPTED, PASSED
from pyvmm.testing.timeline import Phase
from pyvmm.testing.verdicts import VERDICTS, BootError

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA_VERSION = 1


class BootResult(Record):
    """How a boot test ended.

    ``verdict`` is one of OWN_VERDICTS or the ``name`` of an exception of ``verdicts``.
    ``exit_status`` is what ``pyvmm test`` exits with, ``message`` one line.  ``status`` and
    ``signal`` are the command's, None if it did not tell.  ``line`` is the console's line that
    decided, ``before`` up to 40 before it, ``trace`` those behind it.  ``stdout_tail`` and
    ``stderr_tail`` are the ends of the command's output; bytes that are no UTF-8 are spelled out.
    ``warnings`` are the kernel's messages of level warn and worse, if the agent could still read
    them.  ``problems`` are what else went wrong and did not decide.  All texts but the two tails
    are escaped.
    """

    name: str
    verdict: str
    exit_status: int
    message: str
    command: tuple[str, ...] = ()
    status: int | None = None
    signal: int | None = None
    outcome: Outcome | None = None
    line: str = ""
    before: tuple[str, ...] = ()
    trace: tuple[str, ...] = ()
    expected: tuple[Expected, ...] = ()
    began_at_s: float = 0.0
    seconds: float = 0.0
    phases: tuple[Phase, ...] = ()
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_tail: str = ""
    stderr_tail: str = ""
    console_tail: tuple[str, ...] = ()
    console_log: str = ""
    lost_console_bytes: int = 0
    warnings: tuple[str, ...] = ()
    registers: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def is_passed(self) -> bool:
        """True if the test passed."""
        return self.verdict == PASSED

    @property
    def error(self) -> PyvmmError | None:
        """Return the exception for the verdict; None if the test passed."""
        if self.is_passed:
            return None
        kind = next((kind for kind in VERDICTS if kind.name == self.verdict), BootError)
        return kind(self.message, self.outcome, self.line, self.before, self.trace)

    def as_dict(self) -> dict[str, object]:
        """Return the JSON of docs/verdicts.md."""
        found: dict[str, object] = {"pyvmm_boot_test": SCHEMA_VERSION}
        for name in self._fields:
            found[name] = _plain(getattr(self, name))
        return found

    def as_case(self, classname: str = "pyvmm.test") -> Case:
        """Return the test as JUnit has it: an error is a test that could not be run."""
        problem = None if self.is_passed else (self.verdict, self.message, self.text())
        is_error = self.exit_status == 125 or self.verdict == INTERRUPTED
        return Case(
            name=self.name, classname=classname, seconds=self.seconds,
            failure=None if is_error else problem, error=problem if is_error else None,
            system_out=self.stdout_tail, system_err=self.stderr_tail,
        )

    def text(self) -> str:
        """Return all that a person needs to understand a failure, in lines."""
        lines = [f"{self.verdict}: {self.message}"]
        for title, part in self.sections():
            lines += ["", f"{title}:", *(f"  {line}" for line in part)]
        return "\n".join(lines)

    def sections(self) -> list[tuple[str, Sequence[str]]]:
        """Return the titled parts of ``text``, without those that are empty."""
        ended = self.outcome is not None and self.outcome.kind is not Kind.STOPPED
        around = (*self.before, f"> {self.line}", *self.trace) if self.line else ()
        parts: list[tuple[str, Sequence[str]]] = [
            ("outcome", str(self.outcome).split("\n") if ended else ()),
            ("console, with the line that decided", around),
            ("last lines of the console", () if self.line else self.console_tail),
            ("kernel log, warn and worse", self.warnings),
            ("registers", self.registers),
            ("also", self.problems),
        ]
        return [(title, part) for title, part in parts if part]


def _plain(value: object) -> object:
    """Return ``value`` as JSON has it."""
    if isinstance(value, Outcome):
        return {
            "kind": name_of(Kind, value.kind), "text": str(value), "value": value.value,
            "detail": value.detail, "exit_status": value.exit_status,
        }
    if isinstance(value, Record):
        return {name: _plain(getattr(value, name)) for name in value._fields}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value
