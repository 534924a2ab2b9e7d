"""The start, the stop and the close of a machine, in an order, whichever threads call them."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator

from pyvmm.run.runner import Runner


class Lifetime:
    """Has ``stop`` and ``close`` wait for a ``start`` under way: what is half started cannot be
    stopped, and must not be freed.

    ``what`` is the machine in messages.
    """

    def __init__(self, runner: Runner, what: str) -> None:
        self._runner = runner
        self._what = what
        # Re-entrant, so that a handler of a signal that calls stop() inside start() is told so.
        self._lock = threading.RLock()
        self._busy_with = ""
        self._pid = os.getpid()
        self.is_closed = False

    def check_open(self, call: str) -> None:
        """RuntimeError once the machine is closed."""
        if self.is_closed:
            raise RuntimeError(f"{call}: {self._what} was closed")
        self._check_process(call)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Hold up every ``stop`` and ``close`` of other threads meanwhile."""
        with self._lock:
            self.check_open("start()")
            self._busy_with = "start()"
            try:
                yield
            finally:
                self._busy_with = ""

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """Hold up every ``stop`` and ``close`` of other threads meanwhile, which end the new run.

        RuntimeError in a thread of the run.
        """
        self.check_open("rewind()")
        self._runner.refuse_own_threads("rewind()")  # not under the lock, which a close may hold
        with self._lock:
            self.check_open("rewind()")
            self._busy_with = "rewind()"
            try:
                yield
            finally:
                self._busy_with = ""

    def has_begun(self, call: str) -> bool:
        """Wait for a start under way; True if the run has begun.

        RuntimeError in a thread that would wait for itself.
        """
        self._check_process(call)
        self._runner.refuse_own_threads(call)
        with self._lock:
            if self._busy_with:
                raise RuntimeError(
                    f"{call} inside {self._busy_with} would wait for ever: use another thread"
                )
            return self._runner.has_begun

    def close(self, stop: Callable[[], object], free: Callable[[], None]) -> None:
        """Call ``stop`` if the run has begun, then ``free``; once."""
        self._check_process("close()")
        self._runner.refuse_own_threads("close()")  # not under the lock, which a close may hold
        with self._lock:
            has_begun = self.has_begun("close()")
            if not self.is_closed:
                if has_begun:
                    stop()
                self.is_closed = True
                free()

    def forget(self, close: Callable[[], None]) -> None:
        """Close a machine that nobody holds any more; a ResourceWarning says that nobody did."""
        if self.is_closed or os.getpid() != self._pid:
            return
        close()
        warnings.warn(f"{self._what} was never closed", ResourceWarning, stacklevel=2)

    def _check_process(self, call: str) -> None:
        """RuntimeError in a child process, which has none of the machine's threads."""
        if os.getpid() != self._pid:
            raise RuntimeError(f"{call}: {self._what} belongs to process {self._pid}")
