"""Running the tools that make images, and what an image is made with beside its files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux.host import tool_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """``time_s`` is every file's time, in seconds since 1970; None keeps the times they have.

    An empty ``uuid`` lets the tool choose.
    """

    label: str = ""
    uuid: str = ""
    time_s: int | None = None


def run(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *,
    fails_by_words: bool = False,
) -> None:
    """Run ``command``; HostError with its last words if it fails.

    With ``fails_by_words`` any line on standard error but debugfs's banner is a failure.
    """
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        env={**os.environ, "PATH": tool_path(), "LC_ALL": "C", **(environment or {})}, check=False,
    )
    errors = [line for line in done.stderr.splitlines() if line and "debugfs 1." not in line]
    if done.returncode or (fails_by_words and errors):
        words = errors or done.stdout.split("\n")[-2:-1] or [f"exit status {done.returncode}"]
        raise HostError(f"{Path(command[0]).name}: {words[-1].strip()}")
