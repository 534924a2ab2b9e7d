"""Run the commands of a kernel's build into a log, and show how far they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from pyvmm.errors import HostError
from pyvmm.report import complain, say

WHO = "kernel"
_TAIL_LINES = 20
_LINE_S = 15.0
_TERMINAL_S = 0.2


class BuildError(HostError):
    """The kernel cannot be built; the message says why and, where possible, what to type."""


def tell(text: str) -> None:
    """Print one line about the build on standard error."""
    say(text, who=WHO)


class Progress:
    """Runs commands into a log and shows how far they are: a moving line, or one every 15 s."""

    def __init__(self, log: IO[str], environment: Mapping[str, str]) -> None:
        self._log = log
        self._environment = environment
        self._is_terminal = os.isatty(2)
        self._start_s = self._shown_s = time.monotonic()

    def run(self, what: str, command: Sequence[str], *, cwd: Path, steps: int = 0) -> None:
        """Run ``command``; if it fails, print the log's tail and raise BuildError with its path."""
        self._show(what, 0, steps, "", force=self._is_terminal or not steps)
        self._log.write(f"$ {' '.join(command)}\n")
        self._log.flush()
        with subprocess.Popen(
            command, cwd=cwd, env=dict(self._environment), text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
        ) as process:
            try:
                for count, line in enumerate(process.stdout or (), 1):
                    self._log.write(line)
                    self._show(what, count, steps, line.split()[-1] if line.split() else "")
            except BaseException:
                process.terminate()
                process.wait()  # make's children must be gone before their files go
                raise
            finally:
                if self._is_terminal:
                    self._over("")
        self._log.flush()
        if process.returncode:
            path = Path(self._log.name)
            for line in path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]:
                complain(f"  | {line}")
            raise BuildError(f"{what} failed with status {process.returncode}; the log, whose end "
                             f"is above, is {path}")

    def _show(self, what: str, count: int, steps: int, item: str, *, force: bool = False) -> None:
        now_s = time.monotonic()
        every_s = _TERMINAL_S if self._is_terminal else _LINE_S
        if not force and now_s - self._shown_s < every_s:
            return
        self._shown_s = now_s
        elapsed_s = int(now_s - self._start_s)
        line = f"{what} {elapsed_s // 60}:{elapsed_s % 60:02d}"
        if steps and count:
            line += f" {min(99, 100 * count // steps)} % ({count} objects) {item}"
        if self._is_terminal:
            self._over(f"{WHO}: {line}")
        else:
            tell(line)

    def _over(self, line: str) -> None:
        """Write ``line`` in the place of the one before, and leave the cursor at its start."""
        width = shutil.get_terminal_size().columns - 1
        complain(line[:width].ljust(width), end="\r")
