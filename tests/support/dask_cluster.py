"""A Dask cluster of processes on this host: a scheduler, and workers that can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
_COMMAND = (
    "import sys; from dask.__main__ import main; sys.argv[0] = 'dask'; main()"
)


class Cluster:
    """The processes of a cluster; ``address`` is the scheduler's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--scheduler-file", str(file),
        )
        until_s = time.monotonic() + patient(60)
        while not file.exists() or not file.read_text().endswith("}"):
            assert self.scheduler.poll() is None, self.log()
            assert time.monotonic() < until_s, self.log()
            time.sleep(0.05)
        import json

        self.address = str(json.loads(file.read_text())["address"])

    def add_worker(self) -> subprocess.Popen[bytes]:
        """Start a worker that does one run at a time; it may join after the return."""
        return self._start(
            "worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard",
            "--local-directory", str(self._folder), "--memory-limit", "0",
        )

    def log(self) -> str:
        """Return all that the processes have printed."""
        return (self._folder / "log").read_text(errors="replace")

    def close(self) -> None:
        """End all processes."""
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *words], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
            )
        self._processes.append(process)
        return process


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 2) -> Iterator[Cluster]:
    """Context with a cluster of so many workers, whose files are in ``folder``."""
    folder.mkdir()
    found = Cluster(folder)
    try:
        for _ in range(workers):
            found.add_worker()
        _wait_for_workers(found, workers)
        yield found
    finally:
        found.close()


def _wait_for_workers(found: Cluster, count: int) -> None:
    until_s = time.monotonic() + patient(60)
    while found.log().count("Registered to:") < count:
        assert time.monotonic() < until_s, found.log()
        time.sleep(0.05)
