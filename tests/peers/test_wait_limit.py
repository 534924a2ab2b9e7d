"""Waits that are cut short: before, during and after."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm.peers.wait_limit import WaitLimit
from tests.support.patience import patient

NEVER_S = float("inf")


@pytest.fixture
def limit() -> Iterator[WaitLimit]:
    limit = WaitLimit()
    yield limit
    limit.close()


@pytest.fixture
def event_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def later(seconds: float) -> float:
    return time.monotonic() + seconds


def test_an_event_ends_a_wait(limit: WaitLimit, event_fd: int) -> None:
    os.eventfd_write(event_fd, 1)
    assert limit.wait(event_fd, select.POLLIN, later(patient(60)))


def test_time_ends_a_wait(limit: WaitLimit, event_fd: int) -> None:
    until_s = later(0.05)
    assert not limit.wait(event_fd, select.POLLIN, until_s)
    assert time.monotonic() >= until_s


def test_a_limit_that_was_set_before_counts_until_it_is_lifted(
    limit: WaitLimit, event_fd: int
) -> None:
    os.eventfd_write(event_fd, 1)
    limit.set(later(-1))
    assert not limit.wait(event_fd, select.POLLIN, later(patient(60)))
    limit.set(NEVER_S)
    assert limit.wait(event_fd, select.POLLIN, later(patient(60)))


def test_a_wait_under_way_is_cut_short(limit: WaitLimit, event_fd: int) -> None:
    timer = threading.Timer(0.1, lambda: limit.set(later(0.1)))
    timer.start()
    assert not limit.wait(event_fd, select.POLLIN, later(patient(300)))
    timer.join()
    assert time.monotonic() >= limit.latest_s


def test_a_wait_under_way_survives_a_limit_that_is_far(limit: WaitLimit, event_fd: int) -> None:
    timers = [
        threading.Timer(0.1, lambda: limit.set(later(patient(300)))),
        threading.Timer(0.3, os.eventfd_write, (event_fd, 1)),
    ]
    for timer in timers:
        timer.start()
    assert limit.wait(event_fd, select.POLLIN, later(patient(300)))
    for timer in timers:
        timer.join()


def test_after_close_nobody_waits(limit: WaitLimit, event_fd: int) -> None:
    limit.close()
    limit.close()
    limit.set(later(60))
    assert not limit.wait(event_fd, select.POLLIN, later(patient(60)))
