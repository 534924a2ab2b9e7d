"""The I/O loop while it runs: sources come and go, times, parking; from its thread and others."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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


@pytest.fixture
def doorbell() -> Iterator[Doorbell]:
    made = Doorbell()
    yield made
    os.close(made.fd)


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
    begun_s = time.monotonic()

    def call(name: str) -> Callable[[], None]:
        return lambda: calls.append((name, time.monotonic() - begun_s))

    loop.call_at(begun_s + 0.06, call("second"))  # before the loop runs
    with running(loop):
        loop.call_at(begun_s + 0.03, call("first"))
        loop.call_soon(call("at once"))
        wait_for(lambda: len(calls) == 3)
        time.sleep(0.05)
    assert [name for name, _ in calls] == ["at once", "first", "second"]
    assert calls[1][1] >= 0.03
    assert calls[2][1] >= 0.06


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


# Parking


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
