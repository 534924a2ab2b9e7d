"""The I/O loop: every ring of a doorbell is followed by a pass, and nothing starves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from pyvmm.run.io_loop import IoLoop, IoSource


@pytest.fixture
def doorbell() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_a_ring_from_before_the_loop_is_heard(doorbell: int) -> None:
    os.eventfd_write(doorbell, 1)
    passes = []

    def service() -> float | None:
        passes.append(1)
        loop.stop()
        return None

    loop = IoLoop([IoSource(doorbell, service)])
    loop.run()
    assert passes == [1]


def test_a_ring_during_a_pass_makes_another_though_nobody_reads_the_count(doorbell: int) -> None:
    passes = []

    def service() -> float | None:
        passes.append(1)
        if len(passes) == 3:
            loop.stop()
        else:
            os.eventfd_write(doorbell, 1)
        return None

    os.eventfd_write(doorbell, 1)
    loop = IoLoop([IoSource(doorbell, service)])
    loop.run()
    assert len(passes) == 3


def test_a_level_triggered_source_is_served_while_it_is_readable(doorbell: int) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    taken = bytearray()

    def service() -> float | None:
        taken.extend(os.read(reader, 1))
        if len(taken) == 3:
            loop.stop()
        return None

    loop = IoLoop([IoSource(reader, service, edge_triggered=False)])
    loop.run()
    assert taken == b"abc"
    os.close(reader)
    os.close(writer)


def test_the_stop_descriptor_ends_a_loop_that_waits(doorbell: int) -> None:
    os.eventfd_write(doorbell, 1)
    stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def service() -> float | None:
        loop.stop()
        os.eventfd_write(stop, 1)
        return None

    loop = IoLoop([IoSource(doorbell, service)], stop)
    loop.run()
    os.close(stop)


def test_what_has_more_to_do_is_served_on_without_a_ring(doorbell: int) -> None:
    passes = []

    def service() -> float | None:
        passes.append(1)
        if len(passes) == 5:
            loop.stop()
        return 0.0

    os.eventfd_write(doorbell, 1)
    loop = IoLoop([IoSource(doorbell, service)])
    loop.run()
    assert len(passes) == 5


def test_sources_that_have_more_to_do_take_turns(doorbell: int) -> None:
    other = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    passes = []

    def service(name: str) -> float | None:
        passes.append(name)
        if len(passes) == 6:
            loop.stop()
        return 0.0

    for fd in (doorbell, other):
        os.eventfd_write(fd, 1)
    loop = IoLoop([IoSource(doorbell, lambda: service("a")), IoSource(other, lambda: service("b"))])
    loop.run()
    assert "".join(passes) in ("ababab", "bababa")
    os.close(other)


def test_what_has_to_wait_is_served_again_in_time_without_a_ring(doorbell: int) -> None:
    times_s = []

    def service() -> float | None:
        times_s.append(time.monotonic())
        if len(times_s) == 3:
            loop.stop()
        return 0.02

    os.eventfd_write(doorbell, 1)
    loop = IoLoop([IoSource(doorbell, service)])
    loop.run()
    assert all(later - sooner >= 0.02 for sooner, later in pairwise(times_s))


def test_the_stop_descriptor_ends_a_loop_whose_source_waits_for_its_time(doorbell: int) -> None:
    os.eventfd_write(doorbell, 1)
    stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def service() -> float | None:
        os.eventfd_write(stop, 1)
        threading.Timer(0.01, loop.stop).start()
        return 3600.0

    loop = IoLoop([IoSource(doorbell, service)], stop)
    loop.run()
    os.close(stop)
