"""Lines for the person running pyvmm, on standard error, at a bounded rate.

A guest may make a device complain as often as it likes; the log must not grow with it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from pyvmm.lean import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO


class Reporter:
    """Callable that prints ``pyvmm: <line>``; at most ``burst`` lines in ``period_s`` seconds.

    Lines over the limit are counted and the count is said with the next line that passes, or by
    ``close()``.  Control characters are escaped: a line may quote bytes the guest chose.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        burst: int = 20,
        period_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._burst = burst
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._window_start = clock()
        self._in_window = 0
        self._dropped = 0

    def __call__(self, line: str) -> None:
        """Print ``line``, or count it when too many came before it."""
        with self._lock:
            now = self._clock()
            if now - self._window_start >= self._period_s:
                self._window_start, self._in_window = now, 0
            self._in_window += 1
            if self._in_window > self._burst:
                self._dropped += 1
                return
            self._say_dropped()
            self._print(line)

    def close(self) -> None:
        """Say how many lines were left out, if any were."""
        with self._lock:
            self._say_dropped()

    def _say_dropped(self) -> None:
        if self._dropped:
            self._print(f"({self._dropped} more lines like these were left out)")
            self._dropped = 0

    def _print(self, line: str) -> None:
        safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        try:
            self._stream.write(f"pyvmm: {safe}\n")
            self._stream.flush()
        except (OSError, ValueError):
            # A closed standard error is no reason to stop a guest.
            return
