"""Errors of ``pyvmm.launch``: who has to change something is told by the class."""

from __future__ import annotations

from pyvmm.errors import PyvmmError
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.launcher.completed import Completed
    from pyvmm.run.outcome import Outcome


class EndedError(PyvmmError):
    """The run ended while a call waited for the guest, or before the call.

    ``outcome`` says how the run ended.
    """

    def __init__(self, text: str, outcome: Outcome) -> None:
        super().__init__(text)
        self.outcome = outcome


class CommandError(PyvmmError):
    """A command in the guest failed; ``completed`` has its status and output."""

    def __init__(self, completed: Completed) -> None:
        super().__init__(completed.failure)
        self.completed = completed


class OutputLimitError(PyvmmError):
    """A command or a file of the guest has more bytes than are kept in memory."""
