"""Serving on the main thread: signals, and writes that would wait for ever."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pyvmm.bell import Bell
from pyvmm.io_loop import IoSource
from pyvmm.serving import serve
from tests.support.eventfds import fill


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serving_ends_at_a_signal_and_looks_again_at_sigusr1(number: signal.Signals) -> None:
    doorbell = os.eventfd(1, os.EFD_NONBLOCK)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGTSTP, signal.SIGUSR1)]
    looks = []

    def service() -> float | None:
        os.kill(os.getpid(), signal.SIGUSR1)
        return None

    def refresh() -> None:
        looks.append(1)
        os.kill(os.getpid(), number)

    assert serve(lambda: [IoSource(doorbell, service)], refresh=refresh, bell=Bell()) == number
    assert looks == [1]
    after = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGTSTP, signal.SIGUSR1)]
    assert after == before
    os.close(doorbell)


def test_serving_is_not_held_up_by_an_eventfd_that_a_write_waits_for() -> None:
    """Whoever shares the eventfd can fill it up, and make writes wait for a reader."""
    doorbell, full = os.eventfd(1, os.EFD_NONBLOCK), os.eventfd(0)
    fill(full)
    bell = Bell()
    heard: list[bool] = []

    def service() -> float | None:
        if len(heard) < 3:
            heard.append(bell.ring(full))
            return 0.2  # after which the watch sleeps, and has to be woken
        os.kill(os.getpid(), signal.SIGTERM)
        return None

    threads = threading.active_count()
    sources = [IoSource(doorbell, service)]
    assert serve(lambda: sources, refresh=lambda: None, bell=bell) == signal.SIGTERM
    assert heard == [False] * 3
    assert threading.active_count() == threads
    os.close(doorbell)
    os.close(full)
