"""``pyvmm export`` as a user starts it: a process of its own that listens on a socket."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from tests.support.guest import environment
from tests.support.patience import patient

TIMEOUT_S = 30.0


class Export:
    """A running ``pyvmm export --disk DISK --socket SOCKET OPTIONS``, which accepts connections.

    To be used as a context manager: the process is dead when it is left.
    """

    def __init__(self, disk: str | Path, socket: Path, *options: str) -> None:
        self._log = socket.with_name(f"{socket.name}.log")
        before = _inode(socket)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pyvmm", "export", "--disk", str(disk),
                 "--socket", str(socket), *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(),
            )  # fmt: skip
        until_s = time.monotonic() + patient(TIMEOUT_S)
        # A socket left by a killed export is replaced by one that is listened on already.
        while _inode(socket) in (None, before):
            assert self.process.poll() is None, self.messages
            assert time.monotonic() < until_s, f"no {socket}: {self.messages}"
            time.sleep(0.02)

    @property
    def messages(self) -> str:
        """All it has said up to now."""
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        """Until it has said ``text``."""
        until_s = time.monotonic() + patient(TIMEOUT_S)
        while text not in self.messages:
            assert self.process.poll() is None, self.messages
            assert time.monotonic() < until_s, f"no {text!r}: {self.messages}"
            time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return self.process.wait(patient(TIMEOUT_S))

    def kill(self) -> None:
        """SIGKILL; not an error if it has ended."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Export:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()


def _inode(path: Path) -> int | None:
    """Its inode number; None if there is no such file."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
