"""Start, stop and close of a machine by several threads at once."""

from __future__ import annotations

import functools
import gc
import os
import threading
import time
from collections.abc import Callable

import pytest

import pyvmm
from pyvmm.api.bare import BareGuest
from tests.api.test_machine import SPIN, MakeConfig
from tests.api.test_machine import config as config
from tests.support.patience import patient
from tests.support.vhost_user_peers import open_fds

pytestmark = pytest.mark.bare

Make = Callable[[], "pyvmm.Machine | BareGuest"]


@pytest.fixture(params=["machine", "bare"])
def make(request: pytest.FixtureRequest, config: MakeConfig) -> Make:
    spinning = config(SPIN)
    if request.param == "bare":
        return lambda: pyvmm.bare(SPIN, timeout_s=patient(30))
    return lambda: pyvmm.Machine(spinning)


@pytest.mark.parametrize("call", ["stop", "close"])
def test_a_start_under_way_is_waited_for(
    make: Make, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is held in its midst; it was stopped by nobody then, and its threads stayed."""
    before = open_fds(), threading.active_count()
    machine = make()
    is_inside, may_go = threading.Event(), threading.Event()
    spawn = threading.Thread.start

    def slow(thread: threading.Thread) -> None:
        if thread.name == "house":
            is_inside.set()
            may_go.wait(patient(20))
        spawn(thread)

    monkeypatch.setattr(threading.Thread, "start", slow)
    starter = threading.Thread(target=machine.start, name="starter")
    starter.start()
    assert is_inside.wait(patient(20))
    ender = threading.Thread(target=getattr(machine, call), name="ender")
    ender.start()
    time.sleep(0.05)
    assert ender.is_alive(), "it waits for the start"
    may_go.set()
    for thread in (starter, ender):
        thread.join(patient(20))
        assert not thread.is_alive()
    assert not {"house", "vcpu0"} & {thread.name for thread in threading.enumerate()}
    machine.close()
    assert (open_fds(), threading.active_count()) == before


def start(machine: pyvmm.Machine | BareGuest, refused: list[RuntimeError]) -> None:
    try:
        machine.start()
    except RuntimeError as problem:
        refused.append(problem)


def test_starts_and_closes_that_race_leave_nothing_behind(make: Make) -> None:
    before = open_fds(), threading.active_count()
    for _ in range(100):
        machine = make()
        refused: list[RuntimeError] = []

        threads = [
            threading.Thread(target=target) for target in (
                functools.partial(start, machine, refused), machine.close, machine.close
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(patient(20))
        assert all("closed" in str(error) for error in refused)
    assert (open_fds(), threading.active_count()) == before


def test_a_stop_inside_the_start_of_the_same_thread_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the handler of a signal."""
    machine = make()
    spawn = threading.Thread.start

    def stop_first(thread: threading.Thread) -> None:
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match=r"stop\(\) inside start\(\)"):
            machine.stop()
        spawn(thread)

    monkeypatch.setattr(threading.Thread, "start", stop_first)
    machine.start()
    machine.close()


def test_use_before_the_start_and_after_the_close_is_refused() -> None:
    guest = pyvmm.bare(SPIN)
    with pytest.raises(RuntimeError, match=r"wait\(\): the guest was not started"):
        guest.wait()
    guest.close()
    calls: list[Callable[[], object]] = [
        guest.start, guest.run, guest.wait, guest.pause, guest.resume, guest.stop,
        lambda: guest.on_port(1, print), lambda: guest.on_mmio(1 << 32, print),
        lambda: guest.on_exit(print),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="the guest was closed"):
            call()


def drop(machines: list[pyvmm.Machine | BareGuest]) -> None:
    machines.clear()
    gc.collect()


def test_a_machine_that_nobody_closed_is_closed_with_a_warning(make: Make) -> None:
    before = open_fds()
    for _ in range(3):
        forgotten = [make()]
        with pytest.warns(ResourceWarning, match="was never closed"):
            drop(forgotten)
    assert open_fds() == before


def test_a_child_process_is_told_that_the_machine_is_not_its_own(make: Make) -> None:
    with make() as machine:
        machine.start()
        for call in ("close", "stop", "pause"):
            child = os.fork()
            if child == 0:
                try:
                    getattr(machine, call)()
                except RuntimeError as error:
                    os._exit(7 if "belongs to process" in str(error) else 1)
                os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
