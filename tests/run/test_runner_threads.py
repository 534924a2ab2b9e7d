"""Runs that own no main thread: started, waited for and stopped from any, several at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.signals import KICK_SIGNAL, KickHandler
from tests.support.patience import patient
from tests.support.runner_rig import FakeVcpu, SpinningVcpu
from tests.support.started_runner import Started

DEADLINE_S = 20.0
END = Outcome(Kind.RESET)


@pytest.fixture
def started() -> Iterator[Started]:
    made = Started()
    yield made
    if not made.runner.stopped:
        made.runner.stop(END)
    made.close()


def threads_of(started: Started) -> list[str]:
    own = started.runner._this_run.house
    threads = [*started.runner._threads, *([own] if own else [])]
    return sorted(thread.name for thread in threads if thread.is_alive())


def kick_handler() -> int | None:
    """The C handler of the kick signal, which Python's own table does not know."""
    import ctypes

    get_handler = ctypes.pythonapi.PyOS_getsig
    get_handler.restype = ctypes.c_void_p
    found: int | None = get_handler(KICK_SIGNAL)
    return found


def test_a_run_is_waited_for_as_long_as_one_likes_and_stopped(started: Started) -> None:
    started.start()
    assert started.runner.wait(0.01) is None
    assert threads_of(started) == ["disk", "house", "vcpu0"]
    assert started.runner.stop(Outcome(Kind.QUIT)) == Outcome(Kind.QUIT)
    assert threads_of(started) == []
    assert started.runner.stopped
    assert started.runner.wait(0.0) == Outcome(Kind.QUIT)
    assert started.runner.stop(END) == Outcome(Kind.QUIT), "the first outcome stands"


def test_the_guests_own_end_wakes_whoever_waits(started: Started) -> None:
    def guest(vcpu: FakeVcpu) -> int:
        started.output.write(b"bye\n")
        started.runner.finish(END)
        return vcpu.halt()

    started.vcpu.guest = guest
    started.start()
    assert started.runner.wait(patient(DEADLINE_S)) == END
    assert started.printed == b"bye\n"


def test_output_and_deadlines_need_nobody_to_wait(started: Started) -> None:
    def guest(vcpu: FakeVcpu) -> int:
        started.output.write(b"hello\n")
        return vcpu.halt()

    started.vcpu.guest = guest
    started.runner.finish_after(0.2, Outcome(Kind.TIMEOUT))
    started.start()
    until_s = time.monotonic() + patient(DEADLINE_S)
    while started.printed != b"hello\n":
        assert time.monotonic() < until_s
        time.sleep(0.001)
    assert started.runner.wait(patient(DEADLINE_S)) == Outcome(Kind.TIMEOUT)


def test_a_run_touches_nothing_of_the_process(started: Started) -> None:
    def state() -> list[object]:
        numbers = sorted(signal.valid_signals() - {KICK_SIGNAL})
        return [
            [signal.getsignal(number) for number in numbers], sys.getswitchinterval(), os.getcwd(),
            signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        ]

    before, handler = state(), kick_handler()
    started.start()
    assert state() == before
    assert kick_handler() != handler
    started.runner.stop(END)
    assert state() == before
    assert kick_handler() == handler


def test_the_kick_signal_keeps_its_handler_until_its_last_user_has_ended() -> None:
    handler = kick_handler()
    KickHandler.begin()
    ours = kick_handler()
    assert ours not in (None, handler)
    KickHandler.begin()
    KickHandler.end()
    assert kick_handler() == ours
    signal.pthread_kill(threading.get_ident(), KICK_SIGNAL)  # which would end the process
    KickHandler.end()
    assert kick_handler() == handler


def test_a_runner_runs_once(started: Started) -> None:
    started.start()
    with pytest.raises(RuntimeError, match="runs once"):
        started.start()
    started.runner.stop(END)
    with pytest.raises(RuntimeError, match="runs once"):
        started.start()


def test_a_runner_that_was_closed_does_not_run() -> None:
    made = Started()
    made.runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        made.start()
    made.close()


def test_a_run_that_was_stopped_before_it_began_ends_at_once(started: Started) -> None:
    assert started.runner.stop(END) is None
    started.start()
    assert started.runner.wait(patient(DEADLINE_S)) == END


@pytest.mark.parametrize("name", ["wait", "stop", "pause", "quiesce"])
def test_no_thread_of_the_run_may_wait_for_it(started: Started, name: str) -> None:
    refused: list[str] = []

    def refuse(where: str) -> None:
        with pytest.raises(RuntimeError, match=rf"{name}\(\) in a thread of the run"):
            getattr(started.runner, name)(*([END] if name == "stop" else []))
        refused.append(where)

    def guest(vcpu: FakeVcpu) -> int:
        if not refused:
            refuse("vcpu")
            os.eventfd_write(started.doorbell, 1)
        return vcpu.halt()

    def service() -> None:
        refuse("device")
        started.runner.loop.call_soon(house)

    def house() -> None:
        refuse("house")
        started.runner.finish(END)

    started.vcpu.guest, started.service = guest, service
    started.start()
    assert started.runner.wait(patient(DEADLINE_S)) == END
    assert refused == ["vcpu", "device", "house"]


def test_a_start_that_fails_leaves_no_thread(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, handler = threading.Thread.start, kick_handler()
    before = set(threading.enumerate())

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "house":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        started.start()
    assert started.runner.stopped
    assert set(threading.enumerate()) == before
    assert kick_handler() == handler
    outcome = started.runner.wait(0.0)
    assert outcome is not None
    assert outcome.kind is Kind.HOST_ERROR


def test_a_defect_in_the_house_ends_the_run_and_says_so(started: Started) -> None:
    def fail() -> None:
        raise ZeroDivisionError("oops")

    started.start()
    started.runner.loop.call_soon(fail)
    outcome = started.runner.wait(patient(DEADLINE_S))
    assert outcome is not None
    assert outcome.exit_status == 125
    assert "house" in outcome.detail
    assert "oops" in outcome.detail
    assert started.runner.stopped


def test_machines_that_come_and_go_in_several_threads_leave_nothing_behind() -> None:
    """200 of them, each paused, quiesced and resumed on its way; some end by themselves."""
    threads_each, machines_each = 4, 50
    before_fds, before_threads = os.listdir("/proc/self/fd"), set(threading.enumerate())
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    handler = kick_handler()
    raised: list[BaseException] = []

    def one(number: int) -> None:
        made = Started(SpinningVcpu() if number % 3 == 0 else None)
        with contextlib.closing(made):
            made.service = lambda: 0.0
            os.eventfd_write(made.doorbell, 1)
            if number % 5 == 0:
                made.runner.finish_after(0.002, END)
            made.start()
            if number % 2:
                made.runner.quiesce(patient(DEADLINE_S))
            if number % 4 < 2:
                made.runner.resume()
            if number % 7 == 0:
                made.runner.pause(patient(DEADLINE_S))
            assert made.runner.stop(END) == END
            assert made.runner.stopped

    def several() -> None:
        try:
            for number in range(machines_each):
                one(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=several) for _ in range(threads_each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient(10 * DEADLINE_S))
    assert raised == []
    assert set(threading.enumerate()) == before_threads
    assert os.listdir("/proc/self/fd") == before_fds
    assert [signal.getsignal(number) for number in sorted(signal.valid_signals())] == handlers
    assert kick_handler() == handler


# Quiescing


def test_a_quiesced_run_serves_nothing_until_it_is_resumed(started: Started) -> None:
    passes = [0]

    def service() -> float:
        passes[0] += 1
        return 0.0

    started.service = service
    os.eventfd_write(started.doorbell, 1)
    started.start()
    for _ in range(20):
        before = passes[0]
        while passes[0] == before:
            time.sleep(0.0005)
        assert started.runner.pause(patient(DEADLINE_S))
        still = [started.runner.is_still]
        assert started.runner.quiesce(patient(DEADLINE_S)), "a paused guest's devices go on"
        assert started.runner.is_paused
        assert [*still, started.runner.is_still] == [False, True]
        quiet = passes[0]
        time.sleep(0.005)
        assert passes[0] == quiet
        started.runner.resume()
        assert not started.runner.is_paused
    started.runner.stop(END)
    assert not started.runner.quiesce(0.0), "the run is over"
    assert not started.runner.is_still


def test_a_run_quiesced_before_it_begins_begins_so(started: Started) -> None:
    passes: list[int] = []
    started.service = lambda: passes.append(1)
    os.eventfd_write(started.doorbell, 1)
    assert started.runner.quiesce()
    started.start()
    assert started.runner.quiesce(patient(DEADLINE_S))
    assert passes == []
    started.runner.resume()
    until_s = time.monotonic() + patient(DEADLINE_S)
    while not passes:
        assert time.monotonic() < until_s
        time.sleep(0.001)


def test_a_device_that_is_slow_is_quiesced_after_its_pass(started: Started) -> None:
    at_disk, go_on = threading.Event(), threading.Event()

    def service() -> None:
        at_disk.set()
        go_on.wait()

    started.service = service
    os.eventfd_write(started.doorbell, 1)
    started.start()
    at_disk.wait()
    assert not started.runner.quiesce(0.02)
    go_on.set()
    assert started.runner.quiesce(patient(DEADLINE_S))


@pytest.mark.parametrize("end", ["finish", "deadline"])
def test_whatever_ends_a_run_ends_a_quiesced_one(started: Started, end: str) -> None:
    started.start()
    assert started.runner.quiesce(patient(DEADLINE_S))
    if end == "finish":
        started.runner.finish(END)
    else:
        started.runner.finish_after(0.01, END)
    assert started.runner.wait(patient(DEADLINE_S)) == END
    assert started.runner.stopped


class Gone(BaseException):
    """Stands for SystemExit, which threading swallows without a word."""


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, Gone])
@pytest.mark.parametrize("where", ["vcpu", "disk", "house"])
def test_whatever_a_thread_raises_ends_the_run(
    started: Started, where: str, error: type[BaseException]
) -> None:
    def fail(*_arguments: object) -> None:
        raise error("oops")

    started.service = fail
    if where == "vcpu":
        started.vcpu.enter = fail
    started.start()
    if where == "house":
        started.runner.loop.call_soon(fail)
    elif where == "disk":
        os.eventfd_write(started.doorbell, 1)
    outcome = started.runner.wait(patient(DEADLINE_S))
    assert outcome is not None
    assert outcome.kind is Kind.HOST_ERROR
    assert where in outcome.detail
    assert f"{error.__name__}: oops" in outcome.detail
    assert started.runner.stopped


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_part_that_fails_at_the_end_does_not_keep_the_threads(
    started: Started, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error("oops")

    done: list[str] = []
    started.at_end = [fail, lambda: done.append("the next one")]
    started.start()
    assert started.runner.stop(Outcome(Kind.STOPPED)) == Outcome(Kind.STOPPED)
    assert started.runner.stopped
    assert done == ["the next one"]
    assert f"at the end of the run: {error.__name__}: oops" in started.said.getvalue()
