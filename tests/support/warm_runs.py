"""``pyvmm run --snapshot`` and ``pyvmm restore`` as processes of their own, with bare guests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pyvmm.x86 import layout
from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.tiny_guests import out, write_guest

LIMIT_S = 60
WARM = out(layout.WARM_PORT, 1)


def pyvmm(*words: str | Path) -> list[str]:
    """The command line of this checkout's ``pyvmm``."""
    return [sys.executable, "-P", "-m", "pyvmm", *map(str, words)]


def finished(
    words: Sequence[str], stdin: bytes = b"", wait_s: float = LIMIT_S
) -> tuple[int, str, str]:
    """Run ``words`` to the end: exit status, standard output, standard error."""
    done = subprocess.run(
        words, input=stdin, capture_output=True, check=False, timeout=patient(wait_s),
        env=environment(),
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Warmed:
    """Runs guests of a few instructions in ``folder``, and what is saved of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = folder / "warm"
        self.disk = folder / "disk.img"
        self.disk.write_bytes(b"base" * 1024)

    def run_words(self, *code: bytes, options: Sequence[str | Path] = ()) -> list[str]:
        """The command line for a guest of ``code`` that saves itself in ``directory``."""
        kernel = write_guest(self.folder / "guest.elf", *code)
        return pyvmm(
            "run", "--kernel", kernel, "--memory", "32M", "--disk", f"{self.disk},snapshot",
            "--timeout", str(patient(LIMIT_S)), "--snapshot", self.directory, *options,
        )

    def run(self, *code: bytes, options: Sequence[str | Path] = ()) -> tuple[int, str, str]:
        """Run that to the end."""
        return finished(self.run_words(*code, options=options))

    def warm(self, *code: bytes) -> None:
        """Leave a snapshot of a guest that does ``code`` when it goes on."""
        status, _, said = self.run(WARM, *code, options=["--snapshot-exit"])
        assert status == 0, said

    def restore_words(self, *options: str | Path) -> list[str]:
        """The command line that goes on from there."""
        return pyvmm("restore", self.directory, "--timeout", str(patient(LIMIT_S)), *options)

    def restore(self, *options: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
        """Go on from there, to the end."""
        return finished(self.restore_words(*options), stdin)
