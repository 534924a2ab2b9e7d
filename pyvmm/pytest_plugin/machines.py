"""The in-process machines of a test: ``pyvmm.Machine``, for hooks and for learning."""

from __future__ import annotations

from pathlib import Path

from pyvmm.api.machine import Machine
from pyvmm.errors import HostError
from pyvmm.pytest_plugin.plan import Plan
from pyvmm.report import escape

Section = tuple[str, str]
SHOWN_LINES = 40


class OwnMachine:
    """A machine in this process and the file for its console, which is written at its end."""

    def __init__(self, plan: Plan, log: Path | None) -> None:
        self.machine = Machine(plan.config)
        self._log = log

    def sections(self) -> list[Section]:
        """Return the outcome and the console's last lines."""
        outcome = self.machine.outcome
        lines = self.machine.console.text.splitlines()[-SHOWN_LINES:]
        found = [("pyvmm machine: outcome", escape(str(outcome or "none yet")))]
        if lines:
            found.append(("pyvmm machine: console", "\n".join(map(escape, lines))))
        return found

    def close(self) -> None:
        """Stop the machine, free all that it has and write its console; HostError."""
        self.machine.close()
        if self._log is not None:
            try:
                self._log.write_text(self.machine.console.text, encoding="utf-8")
            except OSError as error:
                raise HostError(f"--pyvmm-logs {self._log}: {error.strerror}") from error
