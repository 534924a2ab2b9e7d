"""An eventfd is rung, whatever those who share it have made of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pyvmm.peers.eventfds import EventfdWriter
from tests.support.eventfds import fill, interrupted


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_a_ring_is_heard(eventfd: int) -> None:
    writer = EventfdWriter()
    assert writer.signal(eventfd)
    assert writer.signal(eventfd)
    assert os.eventfd_read(eventfd) == 2
    assert writer.turn == 4


def test_a_full_one_is_as_readable_as_can_be(eventfd: int) -> None:
    fill(eventfd, blocking=False)
    assert EventfdWriter().signal(eventfd)


def test_a_write_that_waits_is_ended_by_a_signal(eventfd: int) -> None:
    fill(eventfd)
    writer = EventfdWriter()
    with interrupted():
        assert not writer.signal(eventfd)
    assert writer.turn == 2


def test_a_watcher_sees_a_write_that_is_under_way(eventfd: int) -> None:
    fill(eventfd)
    writer = EventfdWriter()
    turns = []
    with interrupted(first=lambda: turns.append(writer.turn)):
        writer.signal(eventfd)
    assert turns == [1]


def test_a_watcher_is_woken_once(eventfd: int) -> None:
    writer = EventfdWriter()
    wakes: list[int] = []
    writer.wake = lambda: wakes.append(writer.turn)
    writer.signal(eventfd)
    writer.signal(eventfd)
    assert wakes == [1]
    assert writer.wake is None


def test_no_signal_is_left_behind() -> None:
    before = signal.getsignal(signal.SIGUSR2), threading.active_count()
    with interrupted():
        pass
    assert (signal.getsignal(signal.SIGUSR2), threading.active_count()) == before
