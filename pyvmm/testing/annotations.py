"""Workflow commands of GitHub Actions: our annotations, and none of a guest's.

The runner reads the output of a step line by line.  A line that begins with ``::``, or has ``##[``
anywhere, is a command to it: a guest could mask, group or annotate.  So its commands are stopped
while a guest's output passes (``Fence``).  The runner reads standard output and standard error
through two pipes, so commands are let in again only once it has read all of a guest's.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import secrets
import stat
import termios
import time
from collections.abc import Callable, Mapping

VARIABLE = "GITHUB_ACTIONS"
READ_LIMIT_S = 5.0
"""The longest wait for a reader of what a guest printed."""
READER_S = 0.2
"""Seconds in which the runner has acted on what it has read."""

_DATA = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_PROPERTY = {**_DATA, ":": "%3A", ",": "%2C"}


def is_wanted(environment: Mapping[str, str]) -> bool:
    """True if this is a step of GitHub Actions."""
    return environment.get(VARIABLE, "").lower() == "true"


def annotation(
    level: str, message: str, *, title: str = "", file: str = "", line: int | None = None
) -> str:
    """Return the command for an annotation; ``level`` is error, warning or notice."""
    given = {"file": file, "line": "" if line is None else str(line), "title": title}
    properties = ",".join(
        f"{name}={_escaped(value, _PROPERTY)}" for name, value in given.items() if value
    )
    return f"::{level}{' ' if properties else ''}{properties}::{_escaped(message, _DATA)}"


def defused(line: str) -> str:
    """Return ``line``, which may quote a guest, so that it is no command.

    The runner skips blanks before a ``::``.
    """
    line = line.replace("##[", "##\\x5b")
    return line.replace("::", "\\x3a:", 1) if line.lstrip().startswith("::") else line


def _escaped(text: str, references: Mapping[str, str]) -> str:
    return "".join(references.get(character, character) for character in text)


class Fence:
    """Context in which the runner obeys no command in a guest's output.

    ``say`` prints a line of ours.  ``output_fds`` are where the guest's output goes.  If nobody
    reads that within READ_LIMIT_S, commands stay stopped to the end of the step.
    """

    def __init__(
        self, say: Callable[[str], None], output_fds: tuple[int, ...] = (1, 2)
    ) -> None:
        self._say = say
        self._output_fds = output_fds
        self._token = ""
        self.is_open = True
        """True if the runner obeys commands now."""

    def __enter__(self) -> Fence:
        self._token = secrets.token_hex(16)
        self.is_open = False
        self._say(f"::stop-commands::{self._token}")
        return self

    def __exit__(self, *_exc: object) -> None:
        self.open()

    def open(self) -> None:
        """Let commands in again; idempotent."""
        if not self.is_open and all(map(_is_read, self._output_fds)):
            time.sleep(READER_S)
            self._say(f"::{self._token}::")
            self.is_open = True


def _is_read(fd: int) -> bool:
    """Wait until a pipe is empty; False if it is not within READ_LIMIT_S."""
    until_s = time.monotonic() + READ_LIMIT_S
    with contextlib.suppress(OSError):
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            return True
        count = array.array("i", [0])
        while fcntl.ioctl(fd, termios.FIONREAD, count) == 0 and count[0]:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.01)
    return True
