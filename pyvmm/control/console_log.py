"""The console's last bytes, for all subscribers together."""

from __future__ import annotations

import threading

KEPT_BYTES = 4 << 20
"""A subscriber that is further behind than this loses bytes."""


class ConsoleLog:
    """Keeps the last ``limit`` bytes of the console; positions count from the run's first byte.

    All subscribers read from the same bytes, so a slow one costs no memory of its own.  ``feed``
    is called in the thread that keeps house, all else in the control thread.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept = bytearray()
        self._start = 0

    def feed(self, data: bytes) -> None:
        """Add what the guest printed."""
        with self._lock:
            self._kept += data
            # In large steps, because each step moves all bytes that stay.
            if len(self._kept) > self._limit + (self._limit >> 2):
                excess = len(self._kept) - self._limit
                del self._kept[:excess]
                self._start += excess

    @property
    def end(self) -> int:
        """The position behind the last byte."""
        with self._lock:
            return self._start + len(self._kept)

    def read(self, position: int, limit: int) -> tuple[int, bytes]:
        """Return the position and content of at most ``limit`` bytes from ``position`` on.

        The position is a later one if the bytes there are no longer kept.
        """
        with self._lock:
            position = max(position, self._start)
            offset = position - self._start
            return position, bytes(self._kept[offset : offset + limit])
