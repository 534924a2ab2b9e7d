"""The I/O loop: every ring of a doorbell is followed by a pass, and nothing starves."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pyvmm.io_loop import IoLoop, IoSource


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


def test_what_is_not_drained_is_served_while_it_is_readable(doorbell: int) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    taken = bytearray()

    def service() -> float | None:
        taken.extend(os.read(reader, 1))
        if len(taken) == 3:
            loop.stop()
        return None

    loop = IoLoop([IoSource(reader, service, drain=False)])
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
