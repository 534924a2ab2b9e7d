"""``--executor local``: threads of this process, each of which drives one VM process at a time."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Sequence

from pyvmm.matrix.attempt import attempt
from pyvmm.matrix.executor import Done, Event, Finished, PhaseBegan, Runner, Started, Watch
from pyvmm.matrix.runs import Run


class LocalExecutor:
    """Does ``jobs`` runs at a time; ``folder_of`` makes a run's directory for logs."""

    def __init__(self, runner: Runner, jobs: int, folder_of: Callable[[Run], str]) -> None:
        self._runner = runner
        self._jobs = jobs
        self._folder_of = folder_of
        self._lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._is_stopped = False
        self._todo: queue.SimpleQueue[Run] = queue.SimpleQueue()

    def start(self, runs: Sequence[Run], tell: Callable[[Event], None]) -> None:
        """See ``Executor.start``."""
        for run in runs:
            self._todo.put(run)
        threads = [
            # A second interrupt leaves without them: daemons do not hold up the process's end.
            threading.Thread(target=self._work, args=(tell,), name=f"run{number}", daemon=True)
            for number in range(min(self._jobs, len(runs)))
        ]
        for thread in threads:
            thread.start()
        threading.Thread(target=_join, args=(threads, tell), name="runs", daemon=True).start()

    def stop(self) -> None:
        """See ``Executor.stop``."""
        with self._lock:
            self._is_stopped = True
            watches = list(self._watches.values())
        # Each may take seconds, so none waits for another one.
        for watch in watches:
            threading.Thread(target=watch.stop, name="stop", daemon=True).start()

    def close(self) -> None:
        """See ``Executor.close``."""

    def _work(self, tell: Callable[[Event], None]) -> None:
        while True:
            try:
                run = self._todo.get_nowait()
            except queue.Empty:
                return
            watch = Watch(functools.partial(_tell_phase, tell, run.name))
            with self._lock:
                if self._is_stopped:
                    return
                self._watches[run.name] = watch
            tell(Started(name=run.name))
            result = attempt(self._runner, run, self._folder_of, watch)
            with self._lock:
                del self._watches[run.name]
            tell(Finished(result=result))


def _tell_phase(tell: Callable[[Event], None], name: str, phase: str) -> None:
    tell(PhaseBegan(name=name, phase=phase))


def _join(threads: Sequence[threading.Thread], tell: Callable[[Event], None]) -> None:
    for thread in threads:
        thread.join()
    tell(Done())
