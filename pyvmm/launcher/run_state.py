"""The state of a run in another process, and whoever waits for it to change."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pyvmm.errors import HostError, PyvmmError
from pyvmm.launcher.errors import EndedError
from pyvmm.run.outcome import Outcome

T = TypeVar("T")
END_NOTICE_S = 5.0
"""Time in which the end of a run is told, after its agent was lost by that."""


class RunState:
    """The outcome and the failure of a run.  All methods may be called from any thread.

    ``event_thread`` is the thread that calls the users' callbacks: it must not wait.
    """

    def __init__(self) -> None:
        # The thread itself: its number may be another's after its end.
        self.event_thread: threading.Thread | None = None
        self.ending: Outcome | None = None
        """The outcome as soon as it is known; ``outcome`` is set after the callbacks."""
        self.outcome: Outcome | None = None
        self.failure: PyvmmError | None = None
        self.is_end_told = False
        """True once a call has told its caller that the run is over."""
        self._news = threading.Condition()
        self._wakers: set[Callable[[], None]] = set()
        self._end_callbacks: list[Callable[[Outcome], object]] = []

    # Waiting

    def wait(self, timeout_s: float | None) -> Outcome | None:
        """Return the outcome once there is one; None after ``timeout_s`` seconds."""
        with self._news:
            self._news.wait_for(lambda: self.outcome is not None, timeout_s)
            return self.outcome

    def wait_for(self, is_there: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until ``is_there``; raise what ended the run, or HostError when the time is up."""
        until_s = time.monotonic() + timeout_s
        with self._news:
            while not is_there():
                self.raise_if_over(what)
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise HostError(
                        f"{what}: the process of the VM has not answered in {timeout_s:g} s"
                    )
                self._news.wait(left_s)

    def wait_until(self, is_there: Callable[[], bool], timeout_s: float) -> None:
        """Wait until ``is_there``, the run is over or the time is up; raise nothing."""
        with self._news:
            self._news.wait_for(lambda: is_there() or self.outcome is not None, timeout_s)

    def wait_for_notice(self) -> None:
        """Wait a moment for the end of the run, which is about to be told."""
        if threading.current_thread() is not self.event_thread:
            with self._news:
                self._news.wait_for(
                    lambda: self.outcome is not None or self.failure is not None, END_NOTICE_S
                )

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have ``wake``, which must not wait, called after every change."""
        with self._news:
            self._wakers.add(wake)
        try:
            yield
        finally:
            with self._news:
                self._wakers.discard(wake)

    def refuse_own_thread(self, call: str) -> None:
        """Raise RuntimeError in the thread of the callbacks, which would wait for itself."""
        if threading.current_thread() is self.event_thread:
            raise RuntimeError(f"{call} in a callback would wait for itself: use another thread")

    def raise_if_failed(self) -> None:
        """Raise the error given to ``fail``, if there is one."""
        if self.failure is not None:
            self.is_end_told = True
            raise self.failure

    def raise_if_over(self, what: str) -> None:
        """Raise the error given to ``fail``, or EndedError if the run is over."""
        self.raise_if_failed()
        if self.outcome is not None:
            self.is_end_told = True
            raise EndedError(f"{what}: the run has ended: {self.outcome}", self.outcome)

    def told(self, outcome: T) -> T:
        """Return ``outcome``, which the caller learns of if there is one."""
        self.is_end_told = self.is_end_told or outcome is not None
        return outcome

    # Changes

    def notify(self) -> None:
        """Have all who wait look again."""
        with self._news:
            self._news.notify_all()
            for wake in self._wakers:
                wake()

    def fail(self, error: PyvmmError) -> None:
        """Have every call that waits, now or later, raise ``error``; the first one counts."""
        if not isinstance(error, PyvmmError):
            raise TypeError(f"fail takes a PyvmmError, not {type(error).__name__}")
        with self._news:
            if self.failure is None:
                self.failure = error
        self.notify()

    def begin_anew(self) -> None:
        """The machine was rewound: if its run was over, it is not any more."""
        with self._news:
            self.ending = self.outcome = None
            self.is_end_told = False
        self.notify()

    def on_end(self, callback: Callable[[Outcome], object]) -> None:
        """See ``Vm.on_end``."""
        with self._news:
            outcome = self.ending
            if outcome is None:
                self._end_callbacks.append(callback)
        if outcome is not None:
            callback(outcome)

    def end(
        self, outcome: Outcome,
        run_hook: Callable[[str, Callable[[Outcome], object], Outcome], None],
    ) -> None:
        """The run is over: call the callbacks by ``run_hook``, then tell everybody; once."""
        with self._news:
            if self.ending is not None:
                return
            self.ending = outcome
            callbacks = list(self._end_callbacks)
        for callback in callbacks:
            run_hook("on_end", callback, outcome)
        self.outcome = outcome
        self.notify()
