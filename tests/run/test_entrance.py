"""A run whose threads are confined: every one at its start, and no vCPU runs before all are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm.errors import HostError
from pyvmm.run.entrance import Entrance
from pyvmm.run.outcome import Kind, Outcome
from tests.support.patience import patient
from tests.support.runner_rig import FakeVcpu, Rig, idle
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


def test_every_thread_enters_with_its_kind_before_it_works(started: Started) -> None:
    entered: dict[str, str] = {}
    before: list[dict[str, str]] = []

    def enter(kind: str) -> None:
        entered[threading.current_thread().name] = kind

    def guest(vcpu: FakeVcpu) -> int:
        before.append(dict(entered))
        started.runner.finish(END)
        return vcpu.halt()

    started.runner.enter = enter
    started.vcpu.guest = guest
    started.start()
    assert started.runner.wait(patient(DEADLINE_S)) == END
    assert before == [{"vcpu0": "vcpu", "disk": "disk", "house": "main"}]


@pytest.mark.parametrize("slow", ["disk", "main"])
def test_no_vcpu_runs_before_the_slowest_thread_has_entered(started: Started, slow: str) -> None:
    go_on, ran = threading.Event(), threading.Event()

    def enter(kind: str) -> None:
        if kind == slow:
            assert go_on.wait(patient(DEADLINE_S))

    def guest(vcpu: FakeVcpu) -> int:
        ran.set()
        return vcpu.halt()

    started.runner.enter = enter
    started.vcpu.guest = guest
    started.start()
    time.sleep(0.05)
    assert not ran.is_set()
    go_on.set()
    assert ran.wait(patient(DEADLINE_S))


@pytest.mark.parametrize("refused", ["vcpu", "disk", "main"])
def test_a_thread_that_cannot_enter_ends_the_run_before_the_guest_begins(
    started: Started, refused: str
) -> None:
    ran: list[FakeVcpu] = []

    def enter(kind: str) -> None:
        if kind == refused:
            raise HostError("this host takes no filter")

    def guest(vcpu: FakeVcpu) -> int:
        ran.append(vcpu)
        return vcpu.halt()

    started.runner.enter = enter
    started.vcpu.guest = guest
    started.start()
    assert started.runner.wait(patient(DEADLINE_S)) == Outcome(
        Kind.HOST_ERROR, detail="this host takes no filter"
    )
    assert started.runner.stopped
    assert ran == []


def test_a_run_that_ends_while_its_vcpus_wait_at_the_entrance_stops_them(
    started: Started,
) -> None:
    is_over = threading.Event()

    def enter(kind: str) -> None:
        if kind == "disk":
            assert is_over.wait(patient(DEADLINE_S))

    started.runner.enter = enter
    started.start()
    started.runner.finish(Outcome(Kind.QUIT))
    threading.Timer(0.05, is_over.set).start()
    assert started.runner.wait(patient(DEADLINE_S)) == Outcome(Kind.QUIT)
    assert started.runner.stopped


def test_the_main_thread_of_a_command_enters_too() -> None:
    rig, kinds = Rig(), set[str]()

    def guest(vcpu: FakeVcpu) -> int:
        rig.runner.finish(END)
        return vcpu.halt()

    rig.runner.enter = kinds.add
    try:
        assert rig.run(guest) == END
    finally:
        rig.close()
    assert kinds == {"vcpu", "main"}


def test_a_main_thread_that_cannot_enter_is_an_outcome_too() -> None:
    rig = Rig()

    def enter(kind: str) -> None:
        if kind == "main":
            raise HostError("no")

    rig.runner.enter = enter
    try:
        assert rig.run(idle) == Outcome(Kind.HOST_ERROR, detail="no")
    finally:
        rig.close()


def test_a_closed_entrance_lets_nobody_wait_and_no_vcpu_in() -> None:
    entrance = Entrance(lambda kind: None, 2, lambda error: None)
    entrance.close()
    assert entrance.let_in("vcpu", waits=True) is False
    assert entrance.let_in("main") is True
