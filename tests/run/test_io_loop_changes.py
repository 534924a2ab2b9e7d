"""The I/O loop while it runs: sources come and go, times, parking; from its thread and others."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.run.io_loop import IoLoop, IoSource
from tests.support.loop_rig import Doorbell, running, wait_for
from tests.support.patience import patient


@pytest.fixture
def doorbell() -> Iterator[Doorbell]:
    made = Doorbell()
    yield made
    os.close(made.fd)


def test_a_source_added_by_another_thread_is_served(doorbell: Doorbell) -> None:
    loop = IoLoop()
    with running(loop):
        loop.add(doorbell.source)
        doorbell.ring()
        wait_for(lambda: doorbell.passes == 1)


def test_a_service_may_add_and_remove_sources(doorbell: Doorbell) -> None:
    """Also one that is ready in the same turn: it is not served any more."""
    other = Doorbell()

    def service() -> None:
        loop.remove(first)
        loop.remove(other.source)
        loop.add(doorbell.source)
        doorbell.ring()

    fd = os.eventfd(1, os.EFD_NONBLOCK)
    first = IoSource(fd, service)
    loop = IoLoop([first, other.source])
    other.ring()
    with running(loop):
        wait_for(lambda: doorbell.passes == 1)
    assert other.passes <= 1, "it may have been first"
    os.close(other.fd)
    os.close(fd)


def test_a_removed_source_is_not_served_though_it_has_more_to_do() -> None:
    busy = os.eventfd(1, os.EFD_NONBLOCK)
    passes = [0]

    def service() -> float:
        passes[0] += 1
        return 0.0

    source = IoSource(busy, service)
    loop = IoLoop([source])
    with running(loop):
        wait_for(lambda: passes[0] > 100)
        loop.remove(source)
        before = passes[0]
        time.sleep(0.05)
        assert passes[0] == before
        loop.add(source)
        wait_for(lambda: passes[0] > before)
    os.close(busy)


def test_remove_waits_for_the_pass_under_way() -> None:
    """The descriptor may be closed, and what it serves freed, as soon as it returns."""
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    begun, go_on, events = threading.Event(), threading.Event(), []

    def service() -> None:
        begun.set()
        go_on.wait()
        events.append("pass")

    source = IoSource(fd, service)
    loop = IoLoop([source])
    with running(loop):
        begun.wait()
        timer = threading.Timer(0.05, go_on.set)
        timer.start()
        loop.remove(source)
        events.append("removed")
        timer.join()
    assert events == ["pass", "removed"]
    os.close(fd)


def test_remove_of_what_is_not_there_is_nothing(doorbell: Doorbell) -> None:
    loop = IoLoop()
    loop.remove(doorbell.source)
    with running(loop):
        loop.remove(doorbell.source)
    loop.remove(doorbell.source)


def test_a_second_source_of_one_descriptor_is_refused(doorbell: Doorbell) -> None:
    loop = IoLoop([doorbell.source])
    with pytest.raises(ValueError, match=f"descriptor {doorbell.fd} has a source"):
        loop.add(doorbell.source.replace(service=lambda: None))
    with pytest.raises(ValueError, match="cannot be edge-triggered"):
        loop.add(doorbell.source.replace(is_output=True))
    loop.close()
    with pytest.raises(ValueError, match="has ended"):
        loop.add(doorbell.source.replace(fd=0))


def test_room_to_write_is_waited_for() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    while True:
        try:
            os.write(writer, bytes(4096))
        except BlockingIOError:
            break
    written: list[int] = []

    def service() -> None:
        written.append(os.write(writer, b"x"))
        loop.remove(source)

    source = IoSource(writer, service, edge_triggered=False, is_output=True)
    loop = IoLoop([source])
    with running(loop):
        time.sleep(0.05)
        assert not written
        os.read(reader, 1 << 17)
        wait_for(lambda: written == [1])
    os.close(reader)
    os.close(writer)


def test_one_descriptor_is_waited_for_in_both_directions() -> None:
    """A terminal, or a socket: each service is called for its own direction alone."""
    import socket

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    seen: list[str] = []

    def read() -> None:
        seen.append(ours.recv(10).decode())

    def write() -> None:
        seen.append("room")
        loop.remove(outgoing)

    incoming = IoSource(ours.fileno(), read, edge_triggered=False)
    outgoing = IoSource(ours.fileno(), write, edge_triggered=False, is_output=True)
    loop = IoLoop([incoming])
    with running(loop):
        theirs.send(b"a")
        wait_for(lambda: seen == ["a"])
        loop.add(outgoing)
        wait_for(lambda: seen == ["a", "room"])
        theirs.send(b"b")
        wait_for(lambda: seen == ["a", "room", "b"])
        loop.add(outgoing)
        theirs.send(b"c")
        wait_for(lambda: sorted(seen[3:]) == ["c", "room"])
        loop.remove(incoming)
    ours.close()
    theirs.close()


def test_a_file_is_ready_at_any_time_and_starves_nobody(doorbell: Doorbell, tmp_path: Path) -> None:
    """epoll(7) takes no regular file, and no /dev/null; poll(2) calls them ready."""
    path = tmp_path / "typed"
    path.write_bytes(b"x" * 1000)
    fd = os.open(path, os.O_RDONLY)
    taken = bytearray()

    def service() -> None:
        taken.extend(os.read(fd, 1))
        if len(taken) == 10:
            doorbell.ring()
        if doorbell.passes:
            loop.remove(source)

    source = IoSource(fd, service, edge_triggered=False)
    loop = IoLoop([doorbell.source])
    with running(loop):
        loop.add(source)
        wait_for(lambda: doorbell.passes == 1)
        wait_for(lambda: source.service not in loop._due_s)
        before = len(taken)
        time.sleep(0.02)
        assert 10 <= len(taken) == before < 20
    os.close(fd)


def test_a_descriptor_that_is_none_is_refused_if_nothing_reads_it() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        IoLoop([IoSource(9999, lambda: None)])


def test_a_loop_that_has_ended_keeps_nothing_alive(doorbell: Doorbell) -> None:
    """A service holds a disk, and the disk its memory."""
    class Disk:
        def service(self) -> None:
            loop.stop()

    disk = Disk()
    gone = weakref.ref(disk)
    loop = IoLoop([IoSource(doorbell.fd, disk.service)])
    loop.call_at(float("inf"), disk.service)
    doorbell.ring()
    loop.run()
    del disk
    assert gone() is None


# Times


def test_deadlines_are_met_in_their_order_and_once() -> None:
    loop = IoLoop()
    calls: list[tuple[str, float]] = []
    begun_s, second_s = time.monotonic(), patient(0.3)

    def call(name: str) -> Callable[[], None]:
        return lambda: calls.append((name, time.monotonic() - begun_s))

    loop.call_at(begun_s + second_s, call("second"))  # before the loop runs
    with running(loop):
        loop.call_at(begun_s + second_s / 2, call("first"))
        loop.call_soon(call("at once"))
        wait_for(lambda: len(calls) == 3)
        time.sleep(0.05)
    assert [name for name, _ in calls] == ["at once", "first", "second"]
    assert calls[1][1] >= second_s / 2
    assert calls[2][1] >= second_s


def test_a_cancelled_deadline_is_not_called(doorbell: Doorbell) -> None:
    loop = IoLoop([doorbell.source])
    calls: list[str] = []
    early = loop.call_at(time.monotonic(), lambda: calls.append("early"))
    early.cancel()
    with running(loop):
        late = loop.call_at(time.monotonic() + 0.05, lambda: calls.append("late"))
        late.cancel()
        done = loop.call_at(time.monotonic(), lambda: calls.append("done"))
        wait_for(lambda: calls == ["done"])
        done.cancel()
        never = loop.call_at(float("inf"), lambda: calls.append("never"))
        time.sleep(0.1)
        doorbell.ring()
        wait_for(lambda: doorbell.passes == 1)
        never.cancel()
    assert calls == ["done"]


def test_a_deadline_may_cancel_another_that_is_due_as_well() -> None:
    loop = IoLoop()
    calls: list[str] = []

    def first() -> None:
        calls.append("first")
        second.cancel()

    def last() -> None:
        calls.append("last")
        loop.stop()

    loop.call_at(0.0, first)
    second = loop.call_at(0.0, lambda: calls.append("second"))
    loop.call_at(0.0, last)
    loop.run()
    assert calls == ["first", "last"]
