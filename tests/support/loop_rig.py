"""A doorbell, a thread that runs an IoLoop, and patience: for the tests of the loop."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from pyvmm.run.io_loop import IoLoop, IoSource
from tests.support.patience import patient

DEADLINE_S = 20.0


class Doorbell:
    """An eventfd and how many passes its rings have made."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.passes = 0
        self.source = IoSource(self.fd, self.service)

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def service(self) -> float | None:
        self.passes += 1
        return None


@contextlib.contextmanager
def running(loop: IoLoop) -> Iterator[threading.Thread]:
    """``loop`` in a thread of its own, stopped at the end."""
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield thread
    finally:
        loop.stop()
        thread.join(patient(DEADLINE_S))
        assert not thread.is_alive()


def wait_for(what: Callable[[], bool]) -> None:
    until_s = time.monotonic() + patient(DEADLINE_S)
    while not what():
        assert time.monotonic() < until_s
        time.sleep(0.001)
