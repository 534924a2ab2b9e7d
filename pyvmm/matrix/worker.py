"""The part of a matrix that is done on a worker of a Dask cluster."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

import pyvmm
from pyvmm.config import format_size
from pyvmm.matrix.attempt import attempt
from pyvmm.matrix.executor import Runner, Watch
from pyvmm.matrix.results import RunResult, not_started
from pyvmm.matrix.runs import Run

MAX_FILE_BYTES = 16 << 20
"""Of a longer log the worker sends the beginning and, the larger part, the end."""
MAX_RUN_BYTES = 64 << 20
"""The most bytes of files that come back for one run."""
_BEGINNING = 4 << 20


class RunsOfWorker(WorkerPlugin):
    """The runs under way on one worker: ends each one that nobody wants any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._watches: dict[Any, tuple[str, Watch]] = {}
        self.is_stopped = False
        """True once no further run may begin."""

    def __reduce__(self) -> tuple[type[RunsOfWorker], tuple[str]]:
        return type(self), (self.name,)

    @contextlib.contextmanager
    def watched(self, key: Any, name: str, watch: Watch) -> Iterator[None]:
        """Context in which the run ``name``, of the task ``key``, is under way."""
        self._watches[key] = name, watch
        try:
            yield
        finally:
            self._watches.pop(key, None)

    def transition(self, key: Any, start: str, finish: str, **_kwargs: object) -> None:
        """End the run of a task that was cancelled, or whose client has gone."""
        if finish in ("cancelled", "released") and key in self._watches:
            _stop(self._watches[key][1])

    def stop(self) -> list[str]:
        """End all runs, let none begin, and return the names of those under way."""
        self.is_stopped = True
        watches = list(self._watches.values())
        for _, watch in watches:
            _stop(watch)
        return [name for name, _ in watches]

    def teardown(self, worker: Worker) -> None:
        """End all runs: the worker ends."""
        self.stop()


def _stop(watch: Watch) -> None:
    # The caller is the worker's event loop, which must not wait for a guest.
    threading.Thread(target=watch.stop, name="stop", daemon=True).start()


def do_run(name: str, runner: Runner, run: Run) -> tuple[RunResult, dict[str, bytes]]:
    """Do ``run`` as a task of the matrix ``name``; return its result and its files."""
    worker = get_worker()
    plugin = worker.plugins[name]
    if not isinstance(plugin, RunsOfWorker):
        raise TypeError(f"{name} is the plugin of somebody else")
    where = worker.address

    def tell(phase: str) -> None:
        worker.log_event(name, {"run": run.name, "phase": phase, "where": where})

    watch = Watch(tell)
    # Dask removes the directory of a worker that died when the next one starts.
    with (
        plugin.watched(worker.get_current_task(), run.name, watch),
        tempfile.TemporaryDirectory(prefix="pyvmm-", dir=worker.local_directory) as folder,
    ):
        if plugin.is_stopped:
            return not_started(run.name), {}
        tell("")
        result = attempt(runner, run, lambda _run: folder, watch)
        files, problems = brought_back(folder)
    return result.replace(where=where, problems=(*result.problems, *problems)), files


def stop_runs(name: str, dask_worker: Worker) -> list[str]:
    """End all runs of the matrix ``name`` on a worker; return the names of those under way."""
    plugin = dask_worker.plugins.get(name)
    return plugin.stop() if isinstance(plugin, RunsOfWorker) else []


def version() -> str:
    """Return the version of the worker's pyvmm."""
    return pyvmm.__version__


def brought_back(folder: str) -> tuple[dict[str, bytes], list[str]]:
    """Return the regular files below ``folder`` with their bytes, and what is wrong with others."""
    files: dict[str, bytes] = {}
    problems = []
    room = MAX_RUN_BYTES
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = Path(place, name)
            shown = os.path.relpath(path, folder)
            try:
                if not stat.S_ISREG(path.lstat().st_mode):
                    continue
                data = _bytes_of(path, is_log=place == folder)
            except OSError as error:
                problems.append(f"{shown}: cannot be brought back: {error.strerror}")
                continue
            if data is None or len(data) > room:
                problems.append(
                    f"{shown}: is not brought back from the worker: the limit is "
                    f"{format_size(MAX_FILE_BYTES)} a file, {format_size(MAX_RUN_BYTES)} a run"
                )
                continue
            room -= len(data)
            files[shown] = data
    return files, problems


def _bytes_of(path: Path, *, is_log: bool) -> bytes | None:
    """Return the bytes of a file, of a long log both ends; None for another file too long."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= MAX_FILE_BYTES:
            return file.read(MAX_FILE_BYTES)
        if not is_log:
            return None
        beginning = file.read(_BEGINNING)
        rest = MAX_FILE_BYTES - _BEGINNING
        file.seek(size - rest)
        left_out = size - rest - len(beginning)
        return b"%b\n[pyvmm: %d bytes are left out here]\n%b" % (
            beginning, left_out, file.read(rest)
        )
