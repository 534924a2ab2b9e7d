"""``--executor dask=ADDRESS``: each run is a task of a Dask cluster (``pyvmm[dask]``).

The workers need share no file with us but those that the matrix names.  Results and logs come back
as bytes.  The scheduler gives a run to another worker if the worker that does it dies.  A run ends
on its worker as soon as nobody wants it any more: after ``stop``, or when we are gone.
"""

from __future__ import annotations

import functools
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

import distributed

import pyvmm
from pyvmm.errors import ConfigError
from pyvmm.matrix.executor import Done, Event, Finished, PhaseBegan, Runner, Started
from pyvmm.matrix.needs import Need, kvm_problems, problems, refuse
from pyvmm.matrix.results import HOST_ERROR, RunResult
from pyvmm.matrix.runs import Run
from pyvmm.matrix.worker import RunsOfWorker, do_run, stop_runs, version
from pyvmm.testing.verdicts import HOST_STATUS

CONNECT_S = 10.0
_Future = distributed.Future[tuple[RunResult, dict[str, bytes]]]
LOST_S = 5.0
"""How long a connection to the scheduler may be down."""


class ClusterExecutor:
    """Does runs on the workers of the scheduler at ``address``.

    ``save`` gets a run's name and its logs.  ConfigError if nobody answers there.
    """

    def __init__(
        self, address: str, runner: Runner, save: Callable[[str, dict[str, bytes]], None]
    ) -> None:
        self._option = f"--executor dask={address}"
        self._runner = runner
        self._save = save
        self._name = f"pyvmm-matrix-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._tell: Callable[[Event], None] = lambda _event: None
        self._pending: dict[str, _Future] = {}
        self._is_over = threading.Event()
        _quieten()
        try:
            self._client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(self._option, f"no Dask scheduler answers there: {error}") from error

    def check(self, needs: Sequence[Need]) -> None:
        """Raise ConfigError unless there are workers, with this pyvmm and all files."""
        try:
            if not self._client.scheduler_info(n_workers=-1)["workers"]:
                raise ConfigError(
                    self._option, "has no worker; start one with: dask worker ADDRESS"
                )
            for worker, found in self._ask(version).items():
                if found != pyvmm.__version__:
                    raise ConfigError(
                        self._option,
                        f"worker {worker} has pyvmm {found}, here is {pyvmm.__version__}",
                    )
            for question in (problems, kvm_problems):
                for worker, bad in self._ask(question, needs).items():
                    refuse(bad, f" on worker {worker}")
        except BaseException:
            self.close()
            raise

    def start(self, runs: Sequence[Run], tell: Callable[[Event], None]) -> None:
        """See ``Executor.start``."""
        self._tell = tell
        self._client.subscribe_topic(self._name, self._heard)
        self._client.register_plugin(RunsOfWorker(self._name), name=self._name)
        with self._lock:
            for number, run in enumerate(runs):
                self._pending[run.name] = self._client.submit(
                    do_run, self._name, self._runner, run, key=f"{self._name}-{run.name}",
                    pure=False, priority=-number,
                )
            futures = list(self._pending.items())
        for name, future in futures:
            future.add_done_callback(functools.partial(self._ended, name))
        threading.Thread(target=self._look_after, name="cluster", daemon=True).start()

    def stop(self) -> None:
        """See ``Executor.stop``."""
        threading.Thread(target=self._stop, name="stop", daemon=True).start()

    def close(self) -> None:
        """See ``Executor.close``: what still runs is cancelled, because nobody wants it."""
        self._is_over.set()
        self._client.close(timeout=5)

    def _stop(self) -> None:
        # Runs under way end by themselves, and their logs come back.
        answers = self._client.run(stop_runs, self._name, on_error="ignore")
        under_way = {name for names in answers.values() for name in names}
        with self._lock:
            waiting = {
                name: future for name, future in self._pending.items()
                if name not in under_way and not future.done()
            }
        self._client.cancel(list(waiting.values()))
        for name in waiting:
            self._forget(name)

    def _ask(self, question: Callable[..., Any], *arguments: object) -> dict[str, Any]:
        """Return the workers' answers by their addresses; ConfigError if one cannot answer."""
        found = self._client.run(question, *arguments, on_error="return")
        for worker, answer in found.items():
            if isinstance(answer, ModuleNotFoundError):
                raise ConfigError(
                    self._option, f"worker {worker} has not the pyvmm that is here: {answer}"
                )
            if isinstance(answer, BaseException):
                raise ConfigError(self._option, f"worker {worker}: {answer}")
        return dict(found)

    def _heard(self, event: tuple[float, Any]) -> None:
        """Take an event of a worker: a run, and the phase that begins, "" for the run itself."""
        told = event[1]
        name, phase, where = str(told["run"]), str(told["phase"]), str(told["where"])
        if phase:
            self._tell(PhaseBegan(name=name, phase=phase))
        else:
            self._tell(Started(name=name, where=where))

    def _ended(self, name: str, future: _Future) -> None:
        """Take the result of a run, in a thread of the library."""
        if future.status == "cancelled":
            return  # by us, or by a scheduler that went away
        try:
            result, files = future.result(timeout=LOST_S)
        except Exception as error:
            result, files = _lost(name, error), {}
        self._save(name, files)
        self._tell(Finished(result=result))
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Note that a run is over; release its result on the worker."""
        with self._lock:
            future = self._pending.pop(name, None)
            is_last = not self._pending
        if future is not None:
            future.release()
            if is_last:
                self._is_over.set()
                self._tell(Done())

    def _look_after(self) -> None:
        """Give up if the scheduler is gone for LOST_S."""
        bad = 0
        while not self._is_over.wait(1.0):
            bad = 0 if self._client.status == "running" else bad + 1
            if bad >= LOST_S:
                self._tell(Done(problem=f"{self._option}: the scheduler has gone"))
                return


def _quieten() -> None:
    """Silence the library, which tells of a cluster that goes away in tracebacks; we say a line.

    Its configuration gives some of its loggers levels of their own.
    """
    for name in ("distributed", *logging.root.manager.loggerDict):
        if name.partition(".")[0] == "distributed":
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _lost(name: str, error: Exception) -> RunResult:
    """Return the result of a run that its workers did not bring to an end."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, distributed.KilledWorker):
        message = "each worker that did this run died: too often to try again"
    return RunResult(
        name=name, verdict=HOST_ERROR, exit_status=HOST_STATUS, message=message[:1000]
    )
