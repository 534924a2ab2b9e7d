"""Shells of a snapshot, made ahead of time by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.errors import PyvmmError
from pyvmm.snapshot.shell import Shell
from pyvmm.snapshot.snapshot import Snapshot

MAKERS = 4
"""Threads that make shells: most of a shell's time is waiting in the kernel, which overlaps."""


class Shells:
    """The shells of ``snapshot`` that nobody has taken yet; ``report`` gets lines about them.

    All methods may be called from any thread.
    """

    def __init__(self, snapshot: Snapshot, report: Callable[[str], None]) -> None:
        self._snapshot = snapshot
        self._report = report
        # Re-entrant, and ``close`` waits for no thread that calls it: a snapshot that nobody holds
        # any more is closed by the garbage collector, in whichever thread that happens to be.
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._ready: list[Shell] = []
        self._to_make = 0
        self._makers: set[threading.Thread] = set()
        self._is_closed = False

    def prepare(self, count: int) -> None:
        """Have ``count`` more shells made, and return at once.

        If one cannot be made, a line says why, and the rest is given up.
        """
        with self._lock:
            self._to_make += count
            for _ in range(min(self._to_make, MAKERS) - len(self._makers)):
                maker = threading.Thread(target=self._make, name="shells", daemon=True)
                self._makers.add(maker)
                maker.start()

    @property
    def ready(self) -> int:
        """The number of shells that wait to be taken."""
        return len(self._ready)

    def take(self) -> Shell | None:
        """Return a shell for the caller to use or close; None if none is ready."""
        with self._lock:
            return self._ready.pop() if self._ready else None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was asked for is made, or was given up; False after ``timeout_s``."""
        with self._lock:
            return self._news.wait_for(lambda: not self._makers, timeout_s)

    def close(self) -> None:
        """Make no more, and free those that nobody has taken; idempotent."""
        with self._lock:
            self._is_closed, self._to_make = True, 0
            self._news.wait_for(lambda: not self._makers - {threading.current_thread()})
            ready, self._ready = self._ready, []
        close_all(ready)

    def _make(self) -> None:
        try:
            while self._begin_one():
                shell = self._snapshot.build_shell(report=self._report)
                with self._lock:
                    is_wanted = not self._is_closed
                    if is_wanted:
                        self._ready.append(shell)
                if not is_wanted:
                    shell.close()
        except (PyvmmError, OSError) as error:
            with self._lock:
                self._to_make = 0
            self._report(f"{self._snapshot.name}: no more clones are prepared: {error}")
        finally:
            with self._lock:
                self._makers.discard(threading.current_thread())
                self._news.notify_all()

    def _begin_one(self) -> bool:
        """Count one more as made; False, and the calling maker is none any more, if all are."""
        with self._lock:
            if self._to_make:
                self._to_make -= 1
                return True
            self._makers.discard(threading.current_thread())
            return False


def close_all(shells: list[Shell]) -> None:
    """Close ``shells`` by several threads, because the kernel takes 20 to 40 ms for each VM."""

    def close() -> None:
        while shells:
            try:
                shell = shells.pop()
            except IndexError:
                return
            shell.close()

    closers = [threading.Thread(target=close, daemon=True) for _ in shells[:MAKERS]]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
