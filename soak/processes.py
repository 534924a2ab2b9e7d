"""The VM processes of a soak: how they are started, what they take, what they leave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from soak.errors import TrialError
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[1]
_PR_SET_CHILD_SUBREAPER = 36
END_S = float(os.environ.get("PYVMM_SOAK_END_S", "60"))
"""Time for processes that were told to end, or that nobody needs any more; tests wait less."""


def pyvmm(*words: str | Path) -> list[str]:
    """Return the command line of this checkout's ``pyvmm``."""
    return [sys.executable, "-P", "-m", "pyvmm", *map(str, words)]


def adopt_orphans() -> None:
    """Have every process that is left behind below this one become its child.

    So a helper that outlives its VM is found, whatever session it has put itself in.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def children() -> list[int]:
    """Return the processes whose parent is this one, zombies too."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def wait_until_alone(timeout_s: float = END_S) -> None:
    """Wait until no child is left, and reap them; TrialError that names those that stay."""
    _wait_for(children, timeout_s)


def end_children() -> None:
    """Kill whatever is left, so that the next part does not find it."""
    while left := children():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _wait_for(find: Callable[[], list[int]], timeout_s: float) -> None:
    until_s = time.monotonic() + patient(timeout_s)
    while found := find():
        for pid in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > until_s:
            raise TrialError("left behind: " + "; ".join(map(_described, found)))
        time.sleep(0.005)


class Family:
    """Starts processes of which other threads know, so that orphans can be told from them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: set[int] = set()

    def start(self, words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start ``words`` in a session of its own, its output on pipes."""
        with self._lock:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True, env=environment,
            )
            self._own.add(process.pid)
        return process

    def _orphans(self) -> list[int]:
        with self._lock:
            return [pid for pid in children() if pid not in self._own]

    def wait_for_orphans(self) -> None:
        """Wait until whatever outlives its parent has ended; TrialError that names it."""
        _wait_for(self._orphans, END_S)


def left_in(folder: str) -> str:
    """Return what is left in and of ``folder``: files and bound sockets; empty if nothing is."""
    files = sorted(str(path) for path in Path(folder).rglob("*"))
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()
               if line.split()[-1].startswith(folder)]
    found = [*files, *(f"socket {name}" for name in sockets)]
    return f"left behind: {', '.join(found[:5])}" if found else ""


def _described(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return f"process {pid}: " + b" ".join(words).decode(errors="replace").strip()
    return f"process {pid}"


@contextlib.contextmanager
def killed_at_last(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End ``process`` and its session, whatever has happened, and close its pipes."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
