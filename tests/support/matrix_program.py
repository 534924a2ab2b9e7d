"""``pyvmm matrix`` as a program whose runs are those of ``stand_in_runs``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pyvmm.cli.matrix import matrix_main
from tests.support.patience import patient
from tests.support.stand_in_runs import stand_in

ROOT = Path(__file__).resolve().parents[2]


STAND_IN = (sys.executable, "-m", "tests.support.matrix_program")
REAL = (sys.executable, "-m", "pyvmm", "matrix")


def start(*words: str, program: Sequence[str] = STAND_IN) -> subprocess.Popen[str]:
    """Start ``program``, which is ``pyvmm matrix``, with these words."""
    return subprocess.Popen(
        [*program, *words], cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def with_small_disk(folder: Path, program: Sequence[str], before: str = "true") -> list[str]:
    """Return ``program`` behind a command that makes ``folder`` a disk of 64 KiB, for it alone.

    ``before`` is for the shell, after that.
    """
    folder.mkdir()
    user = ["--map-root-user"] if os.geteuid() else []
    script = f'mount -t tmpfs -o size=64k none "$0" && {before} && exec "$@"'
    return ["unshare", "--mount", *user, "sh", "-c", script, str(folder), *program]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end; return exit status, standard output and standard error."""
    out, error = process.communicate(timeout=patient(60))
    return process.returncode, out, error


def until(holds: Callable[[], bool]) -> None:
    """Wait until ``holds`` returns True."""
    until_s = time.monotonic() + patient(60)
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def matrix(folder: Path, commands: str, head: str = "") -> Path:
    """Write a matrix with a kernel, which is its own file, and these commands; return its path."""
    path = folder / "m.toml"
    path.write_text(f"{head}\n[kernels]\nk = 'm.toml'\n[commands]\n{commands}\n")
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(matrix_main(sys.argv[1:], stand_in))
