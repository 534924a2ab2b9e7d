"""An I/O loop that is parked and resumed, and asked for things by many threads."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm.run.io_loop import IoLoop, IoSource
from tests.support.loop_rig import DEADLINE_S, Doorbell, running, wait_for
from tests.support.patience import patient


@pytest.fixture
def doorbell() -> Iterator[Doorbell]:
    made = Doorbell()
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("companions", [0, 1])
def test_a_parked_loop_serves_nobody_until_it_is_resumed(companions: int) -> None:
    """Be the busy source alone, which is served without a wait in between, or one of two."""
    busy = os.eventfd(1, os.EFD_NONBLOCK)
    passes = [0]

    def service() -> float:
        passes[0] += 1
        return 0.0

    others = [Doorbell() for _ in range(companions)]
    loop = IoLoop([IoSource(busy, service), *(other.source for other in others)])
    with running(loop):
        for _ in range(50):
            before = passes[0]
            wait_for(lambda: passes[0] > before)  # noqa: B023
            assert loop.park(patient(DEADLINE_S))
            parked = passes[0]
            for other in others:
                other.ring()
            time.sleep(0.002)
            assert passes[0] == parked
            assert not any(other.passes for other in others)
            loop.resume()
            for other in others:
                wait_for(lambda: other.passes == 1)  # noqa: B023
                other.passes = 0
    for fd in (busy, *(other.fd for other in others)):
        os.close(fd)


def test_a_park_that_takes_too_long_stays_asked_for() -> None:
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    begun, go_on = threading.Event(), threading.Event()

    def service() -> float:
        begun.set()
        go_on.wait()
        return 0.0

    loop = IoLoop([IoSource(fd, service)])
    with running(loop):
        begun.wait()
        assert not loop.park(0.01)
        go_on.set()
        assert loop.wait_until_parked(patient(DEADLINE_S))
        loop.resume()
        assert not loop.wait_until_parked(0.01)
    os.close(fd)


def test_a_loop_asked_before_it_runs_begins_parked(doorbell: Doorbell) -> None:
    loop = IoLoop([doorbell.source])
    assert loop.park(), "nothing is under way"
    doorbell.ring()
    with running(loop):
        time.sleep(0.02)
        assert doorbell.passes == 0
        assert loop.wait_until_parked(patient(DEADLINE_S))
        loop.remove(doorbell.source)  # a parked loop can be changed
        loop.add(doorbell.source)
        loop.call_soon(doorbell.ring)
        time.sleep(0.02)
        assert doorbell.passes == 0
        loop.resume()
        wait_for(lambda: doorbell.passes > 0)


def test_a_parked_loop_can_be_stopped(doorbell: Doorbell) -> None:
    loop = IoLoop([doorbell.source])
    with running(loop):
        assert loop.park(patient(DEADLINE_S))


def test_a_loop_refuses_to_wait_for_itself(doorbell: Doorbell) -> None:
    refused: list[str] = []

    def service() -> None:
        with pytest.raises(RuntimeError, match="itself"):
            loop.park()
        refused.append("park")
        with pytest.raises(RuntimeError, match="itself"):
            loop.wait_until_parked(None)
        refused.append("wait")
        loop.stop()

    loop = IoLoop([IoSource(doorbell.fd, service)])
    doorbell.ring()
    loop.run()
    assert refused == ["park", "wait"]


def test_one_eventfd_wakes_several_loops() -> None:
    wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    loops = [IoLoop((), wake_fd) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for loop in loops:
            stack.enter_context(running(loop))
        for loop in loops:
            loop.begin_park()
        assert all(loop.wait_until_parked(patient(DEADLINE_S)) for loop in loops)
        for loop in loops:
            loop.resume()
    os.eventfd_write(wake_fd, 1)  # it is still ours
    os.close(wake_fd)


def test_many_threads_change_a_loop_at_once() -> None:
    """Sources come and go under it, times and parks too: nothing is lost, and nothing is left."""
    loop = IoLoop()
    before = len(os.listdir("/proc/self/fd"))
    raised: list[BaseException] = []

    def change() -> None:
        try:
            for _ in range(100):
                doorbell = Doorbell()
                loop.add(doorbell.source)
                doorbell.ring()
                wait_for(lambda: doorbell.passes > 0)  # noqa: B023
                loop.call_at(0.0, doorbell.ring).cancel()
                loop.remove(doorbell.source)
                os.close(doorbell.fd)
        except BaseException as error:
            raised.append(error)

    def park() -> None:
        for _ in range(100):
            loop.park(patient(DEADLINE_S))
            loop.resume()

    with running(loop):
        threads = [threading.Thread(target=change) for _ in range(4)]
        threads.append(threading.Thread(target=park))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(patient(DEADLINE_S))
        assert not any(thread.is_alive() for thread in threads)
    assert raised == []
    assert len(os.listdir("/proc/self/fd")) == before - 2, "its epoll and its eventfd are closed"
