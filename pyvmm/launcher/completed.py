"""The end of a command in the guest, as ``vm.run`` returns it."""

from __future__ import annotations

import shlex

from pyvmm.launcher.errors import CommandError
from pyvmm.report import escape
from pyvmm.startup.types import Record

SHOWN_CHARACTERS = 2000
"""So much of the end of a failed command's stderr is quoted."""


class Completed(Record):
    """A command that has ended, with what it printed.

    Exactly one of ``status`` (the exit status) and ``signal`` (the number of the signal that killed
    the command) is not None.  With ``timed_out`` the command was killed at its time limit.
    ``stdout_bytes`` and ``stderr_bytes`` are empty for a stream that went into a file.
    """

    argv: tuple[str, ...]
    status: int | None = None
    signal: int | None = None
    timed_out: bool = False
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""

    @property
    def stdout(self) -> str:
        """Return the standard output as text; bytes that are no UTF-8 are U+FFFD."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Return the standard error as text; bytes that are no UTF-8 are U+FFFD."""
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def is_success(self) -> bool:
        """True if the command ended with status 0, in its time."""
        return self.status == 0 and not self.timed_out

    @property
    def failure(self) -> str:
        """Return one line that says how the command failed, with the end of its stderr."""
        if self.timed_out:
            how = "was killed at its time limit"
        elif self.signal is not None:
            how = f"was killed by signal {self.signal}"
        else:
            how = f"ended with status {self.status}"
        quoted = escape(self.stderr[-SHOWN_CHARACTERS:].strip())
        command = escape(shlex.join(self.argv)[:SHOWN_CHARACTERS])
        return f"command {command} {how}{f': {quoted}' if quoted else ''}"

    def check(self) -> Completed:
        """Return the command itself if it succeeded; CommandError if not."""
        if not self.is_success:
            raise CommandError(self)
        return self

    def __repr__(self) -> str:
        how = f"status={self.status}" if self.signal is None else f"signal={self.signal}"
        limit = ", timed_out=True" if self.timed_out else ""
        return (
            f"Completed({list(self.argv)!r}, {how}{limit}, stdout={_short(self.stdout)}, "
            f"stderr={_short(self.stderr)})"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
