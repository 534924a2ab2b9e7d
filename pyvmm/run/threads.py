"""The threads of one run: started, known by themselves, and joined within a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from pyvmm.run.outcome import Outcome


class RunThreads:
    """Daemon threads: a thread stuck in a dead disk's system call must not keep the process.

    ``failed(name, error)`` is called in a thread whose body raises: a defect of ours, or anything
    that a script's own disk or device lets out, SystemExit too.
    """

    def __init__(self, failed: Callable[[str, BaseException], None]) -> None:
        self._failed = failed
        self._threads: list[threading.Thread] = []

    def spawn(self, name: str, body: Callable[[], None]) -> None:
        """Run ``body`` in a new thread called ``name``."""
        def guarded() -> None:
            try:
                body()
            except BaseException as error:
                self._failed(name, error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)  # before it can ask whether it is one of them
        thread.start()

    def join(self, timeout_s: float) -> list[str]:
        """Join all, within ``timeout_s`` seconds; return the names of the threads still alive."""
        until_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():  # a thread that could not be started cannot be joined
                thread.join(max(0.0, until_s - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]

    @property
    def are_alive(self) -> bool:
        """True if any thread is alive."""
        return any(thread.is_alive() for thread in self._threads)

    def __iter__(self) -> Iterator[threading.Thread]:
        return iter(list(self._threads))


class OneRun:
    """The end of one run: its outcomes, the first of which counts, and when it is over.

    ``stop`` has the thread that keeps house end the run.  ``house`` is that thread, if it is the
    run's own.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        # Appending is atomic, so also safe in a signal handler that interrupts an append.
        self.outcomes: list[Outcome] = []
        self.is_over = threading.Event()
        self.house: threading.Thread | None = None

    def finish(self, outcome: Outcome) -> None:
        """See ``Runner.finish``."""
        self.outcomes.append(outcome)
        self._stop()

    def wait(self, timeout_s: float | None) -> Outcome | None:
        """See ``Runner.wait``."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self.is_over.wait(timeout_s):
            return None
        if self.house is not None:
            self.house.join(left_s(until_s))
            if self.house.is_alive():
                return None
        return self.outcomes[0]


def do_all(actions: Sequence[Callable[[], None]], report: Callable[[str], None]) -> None:
    """Do all of ``actions`` at the end of a run, and report those that raise."""
    for action in actions:
        try:
            action()
        except BaseException as error:  # the threads must be stopped all the same
            report(f"at the end of the run: {type(error).__name__}: {error}")


def place_of(error: BaseException) -> str:
    """Return where ``error`` was raised, ``file:line``."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "nowhere"


def culprit_of(error: BaseException) -> str:
    """Return ``internal error``, or ``error`` if it was raised in code that is not pyvmm's."""
    own = os.path.dirname(os.path.dirname(__file__)) + os.sep
    return "internal error" if place_of(error).startswith(own) else "error"


def left_s(until_s: float | None) -> float | None:
    """Return the seconds until ``until_s`` (time.monotonic), at least 0; None for no limit."""
    return None if until_s is None else max(0.0, until_s - time.monotonic())
