"""Running the commands of a kernel's build, and showing how far they are."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


class BuildError(Exception):
    """The kernel cannot be built; the message says why and, where it can, what to type."""


class Progress:
    """Runs commands into a log and shows how far they are: a moving line, or one every 15 s."""

    def __init__(self, log: IO[str], environment: Mapping[str, str]) -> None:
        self._log = log
        self._environment = environment
        self._tty = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()

    def run(self, what: str, command: Sequence[str], *, cwd: Path, steps: int = 0) -> None:
        """Run ``command``; BuildError with the log's tail and path when it fails."""
        self._show(what, 0, steps, "", force=self._tty or not steps)
        self._log.write(f"$ {' '.join(command)}\n")
        self._log.flush()
        with subprocess.Popen(command, cwd=cwd, env=dict(self._environment), text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, errors="replace") as process:
            try:
                for count, line in enumerate(process.stdout or (), 1):
                    self._log.write(line)
                    self._show(what, count, steps, line.split()[-1] if line.split() else "")
            except BaseException:
                process.terminate()
                process.wait()  # make's children must be gone before their files go
                raise
            finally:
                sys.stderr.write("\r\033[K" if self._tty else "")
        self._log.flush()
        if process.returncode:
            path = Path(self._log.name)
            tail = "".join(f"  | {line}\n" for line in path.read_text().splitlines()[-20:])
            raise BuildError(f"{what} failed with status {process.returncode}; "
                             f"the log is {path} and ends so:\n{tail}")

    def _show(self, what: str, count: int, steps: int, item: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._shown < (0.2 if self._tty else 15):
            return
        self._shown = now
        elapsed = int(now - self._start)
        line = f"kernel: {what} {elapsed // 60}:{elapsed % 60:02d}"
        if steps and count:
            line += f" {min(99, 100 * count // steps)} % ({count} objects) {item}"
        if self._tty:
            columns = shutil.get_terminal_size().columns
            sys.stderr.write(f"\r{line[: columns - 1]}\033[K")
            sys.stderr.flush()
        else:
            print(line, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """One line to the person."""
    print(f"kernel: {text}", file=sys.stderr, flush=True)
