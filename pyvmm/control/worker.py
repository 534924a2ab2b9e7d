"""Work that waits for the guest or for a disk, in a thread beside the control server's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from pyvmm.control.connection import Call
from pyvmm.control.messages import RequestError
from pyvmm.errors import PyvmmError, SnapshotError
from pyvmm.run.io_loop import IoLoop

T = TypeVar("T")
MAX_WAITING = 16
"""Requests that may wait for their turn, of all clients together."""


class Work(Generic[T]):
    """One request's work: ``act`` waits, in a thread of its own; ``done`` answers in the loop's."""

    def __init__(self, call: Call, act: Callable[[], T], done: Callable[[T], None]) -> None:
        self.call = call
        self._act, self._done = act, done
        self._result: list[T] = []
        self._refusal: tuple[str, str, dict[str, object]] = ("host", "", {})
        """Kind, text and details of the answer, if there is no result."""

    def run(self) -> None:
        """Do the work; whatever it raises is the request's answer."""
        try:
            self._result.append(self._act())
        except Exception as error:  # a client's request must not end the server
            self._refusal = _refusal_of(self.call.method, error)

    def finish(self) -> None:
        """Answer the request."""
        if self._result:
            self._done(self._result.pop())
            return
        kind, text, details = self._refusal
        self.call.refuse(kind, text, details)


def _refusal_of(method: str, error: Exception) -> tuple[str, str, dict[str, object]]:
    """Return the answer to a request whose work raised ``error``; nothing keeps the error."""
    if isinstance(error, SnapshotError):
        details: dict[str, object] = {"subject": error.subject, "problem": error.problem}
        return "snapshot", f"{method}: {error}", details
    if isinstance(error, (PyvmmError, OSError, RuntimeError)):
        return "host", f"{method}: {error}", {}
    return "host", f"{method}: internal error: {type(error).__name__}: {error}", {}


class Worker:
    """Does one piece of work after the other; every method is called in the thread of ``loop``.

    ``idle`` is called when there is no more.  Work whose client goes away before its turn is
    dropped; work that has begun goes on to its end.
    """

    def __init__(self, loop: IoLoop, idle: Callable[[], None]) -> None:
        self._loop = loop
        self._idle = idle
        self._waiting: deque[Work[object]] = deque()
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """True while work is under way or waits; from any thread."""
        return self._thread is not None

    def submit(self, call: Call, act: Callable[[], T], done: Callable[[T], None]) -> None:
        """Have ``act`` called, and ``done`` with its result; RequestError if too much waits.

        An error of ``act`` is the call's answer.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise RequestError(
                "limit", f"{call.method}: {MAX_WAITING} requests wait for their turn; wait for one"
            )
        work = Work(call, act, done)
        self._waiting.append(work)  # type: ignore[arg-type] # its result goes to its own ``done``
        call.when_over = lambda: self._forget(work)  # type: ignore[arg-type]
        if self._thread is None:
            self._begin()

    def join(self, timeout_s: float) -> None:
        """Wait for the work under way; from any thread."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _begin(self) -> None:
        work = self._waiting.popleft()
        work.call.when_over = None
        self._thread = threading.Thread(
            target=self._run, args=(work,), name=f"control {work.call.method}", daemon=True
        )
        self._thread.start()

    def _run(self, work: Work[object]) -> None:
        work.run()
        self._loop.call_soon(lambda: self._end(work))

    def _end(self, work: Work[object]) -> None:
        work.finish()
        if self._waiting:
            self._begin()
        else:
            self._thread = None
            self._idle()

    def _forget(self, work: Work[object]) -> None:
        if work in self._waiting:
            self._waiting.remove(work)
