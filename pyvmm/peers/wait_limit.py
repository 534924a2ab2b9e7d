"""Waits for other processes that somebody else may cut short while they last."""

from __future__ import annotations

import contextlib
import os
import select
import time


class WaitLimit:
    """No ``wait`` goes on beyond the time that was ``set`` last, be it under way already.

    One thread waits; any thread may set, and so may a signal handler on the very thread that
    waits, to which Python then goes back (PEP 475).
    """

    def __init__(self) -> None:
        self.latest_s = float("inf")
        """On time.monotonic."""
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self, latest_s: float) -> None:
        """Let waits last until ``latest_s`` (time.monotonic) at most; nothing after ``close``."""
        self.latest_s = latest_s
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile, or full
            os.eventfd_write(self._fd, 1)

    def wait(self, fd: int | None, event: int, until_s: float) -> bool:
        """Sleep until ``event`` of ``fd``; False if ``until_s`` or the limit has come before."""
        if self._fd < 0:
            return False
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        if fd is not None:
            poller.register(fd, event)
        while True:
            left_s = min(until_s, self.latest_s) - time.monotonic()
            if left_s <= 0:
                return False
            for ready, _ in poller.poll(left_s * 1000):
                if ready == fd:
                    return True
                # Only then is the limit looked at again: none is missed.
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._fd)

    def close(self) -> None:
        """Free the eventfd; idempotent.  Nobody waits any more."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
