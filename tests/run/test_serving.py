"""Serving on the main thread: signals, and writes that would wait for ever."""

from __future__ import annotations

import os
import select
import signal
import threading
import time

import pytest

from pyvmm.peers.eventfds import EventfdWriter
from pyvmm.peers.wait_limit import WaitLimit
from pyvmm.run.io_loop import IoSource
from pyvmm.run.serving import serve
from tests.support.eventfds import fill
from tests.support.patience import patient


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serving_ends_at_a_signal_and_looks_again_at_sigusr1(number: signal.Signals) -> None:
    doorbell = os.eventfd(1, os.EFD_NONBLOCK)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGTSTP, signal.SIGUSR1)]
    looks = []
    hurries: list[float] = []

    def service() -> float | None:
        os.kill(os.getpid(), signal.SIGUSR1)
        return None

    def refresh() -> None:
        looks.append(1)
        os.kill(os.getpid(), number)

    sources = [IoSource(doorbell, service)]
    ended_by = serve(
        lambda: sources, refresh=refresh, hurry=hurries.append, eventfd_writer=EventfdWriter()
    )
    assert ended_by == number
    assert len(hurries) == 1
    assert looks == [1]
    after = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGTSTP, signal.SIGUSR1)]
    assert after == before
    os.close(doorbell)


def test_serving_is_not_held_up_by_an_eventfd_that_a_write_waits_for() -> None:
    """Whoever shares the eventfd can fill it up, and make writes wait for a reader."""
    doorbell, full = os.eventfd(1, os.EFD_NONBLOCK), os.eventfd(0)
    fill(full)
    writer = EventfdWriter()
    heard: list[bool] = []

    def service() -> float | None:
        if len(heard) < 3:
            heard.append(writer.signal(full))
            return 0.2  # after which the watch sleeps, and has to be woken
        os.kill(os.getpid(), signal.SIGTERM)
        return None

    threads = threading.active_count()
    sources = [IoSource(doorbell, service)]
    number = serve(
        lambda: sources, refresh=lambda: None, hurry=lambda until_s: None, eventfd_writer=writer
    )
    assert number == signal.SIGTERM
    assert heard == [False] * 3
    assert threading.active_count() == threads
    os.close(doorbell)
    os.close(full)


def test_fault_5_a_source_that_waits_for_a_server_hears_of_the_signal() -> None:
    """The very thread that takes the signal waits, and Python would have it wait on (PEP 475)."""
    doorbell, answer = os.eventfd(1, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    limit = WaitLimit()
    came: list[bool] = []

    def service() -> float | None:
        came.append(limit.wait(answer, select.POLLIN, time.monotonic() + patient(300)))
        return None

    stopper = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    sources = [IoSource(doorbell, service)]

    def start() -> list[IoSource]:
        stopper.start()
        return sources

    number = serve(start, refresh=lambda: None, hurry=limit.set, eventfd_writer=EventfdWriter())
    assert number == signal.SIGTERM
    assert came == [False]
    stopper.join()
    limit.close()
    os.close(doorbell)
    os.close(answer)
