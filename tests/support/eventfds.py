"""Eventfds that make whoever writes them wait, and an end to the wait."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

MOST = (1 << 64) - 2
"""The most that a counter holds."""


def fill(fd: int, *, blocking: bool = True) -> None:
    """Fill the eventfd ``fd`` up; with ``blocking`` whoever writes to it waits, for good."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
    os.eventfd_write(fd, MOST)
    os.set_blocking(fd, blocking)


@contextlib.contextmanager
def interrupted(
    after_s: float = 0.05, first: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """The calling thread, the main one, gets a signal every ``after_s`` seconds, ``first`` being
    called before the first."""
    over = threading.Event()
    thread_id = threading.get_ident()

    def run() -> None:
        before = first
        while not over.wait(after_s):
            before()
            before = int
            signal.pthread_kill(thread_id, signal.SIGUSR2)

    saved = signal.signal(signal.SIGUSR2, lambda *_: None)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR2, saved)
