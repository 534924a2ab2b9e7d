"""A run that is held still, whoever resumes it, and one that begins anew after its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from pyvmm.console.place import Console
from pyvmm.run.io_loop import IoLoop, IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from tests.support.patience import patient
from tests.support.started_runner import Started

DEADLINE_S = 20.0
END, STOPPED = Outcome(Kind.RESET), Outcome(Kind.STOPPED)


@pytest.fixture
def started() -> Iterator[Started]:
    threads = threading.active_count()
    made = Started()
    yield made
    if not made.runner.stopped:
        made.runner.stop(END)
    made.close()
    assert threading.active_count() == threads


def state_of(runner: Runner) -> tuple[bool, bool]:
    return runner.is_paused, runner.is_quiesced


def test_what_ran_runs_on_and_what_was_paused_stays_so(started: Started) -> None:
    started.start()
    runner = started.runner
    for before in (
        (lambda: runner.resume(), (False, False)),
        (lambda: runner.pause(patient(DEADLINE_S)), (True, False)),
        (lambda: runner.quiesce(patient(DEADLINE_S)), (True, True)),
    ):
        prepare, expected = before
        prepare()
        assert runner.hold("a test", patient(DEADLINE_S))
        assert runner.is_still
        runner.let_go()
        assert state_of(runner) == expected
        runner.resume()


def test_who_resumes_or_pauses_meanwhile_is_obeyed_afterwards(started: Started) -> None:
    started.start()
    runner = started.runner
    assert runner.quiesce(patient(DEADLINE_S))
    assert runner.hold("a test", patient(DEADLINE_S))
    runner.resume()
    assert runner.is_still, "it is held"
    runner.let_go()
    assert state_of(runner) == (False, False)
    assert runner.hold("a test", patient(DEADLINE_S))
    assert runner.pause(patient(DEADLINE_S))
    runner.let_go()
    assert state_of(runner) == (True, False)


def test_only_one_holds_and_nobody_holds_his_own_thread(started: Started) -> None:
    errors: list[str] = []

    def service() -> None:
        with pytest.raises(RuntimeError) as caught:
            started.runner.hold("rewind()")
        errors.append(str(caught.value))
        done.set()

    done = threading.Event()
    started.service = service
    started.start()
    os.eventfd_write(started.doorbell, 1)
    assert done.wait(patient(DEADLINE_S))
    assert errors == ["rewind() in a thread of the run would wait for ever: use another"]
    assert started.runner.hold("a test", patient(DEADLINE_S))
    with pytest.raises(RuntimeError, match="is being saved or rewound already"):
        started.runner.hold("a test")
    started.runner.let_go()


@pytest.mark.parametrize("at", ["begin_park", "wait_until_parked", "wait_for_pass"])
def test_ctrl_c_in_a_hold_lets_the_guest_go(
    started: Started, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    started.start()
    with monkeypatch.context() as patch:
        patch.setattr(IoLoop, at, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            started.runner.hold("a test", patient(DEADLINE_S))
    assert state_of(started.runner) == (False, False)
    assert started.runner.hold("a test", patient(DEADLINE_S))
    started.runner.let_go()


def test_a_run_that_is_over_is_not_held(started: Started) -> None:
    started.start()
    started.runner.stop(STOPPED)
    assert not started.runner.hold("a test", patient(DEADLINE_S))
    assert started.runner.is_over


def test_the_house_does_what_others_ask_for_and_their_errors_are_theirs(started: Started) -> None:
    started.start()
    names: list[str] = []
    started.runner.in_house(lambda: names.append(threading.current_thread().name))
    with pytest.raises(ZeroDivisionError):
        started.runner.in_house(lambda: [1 // 0].clear())
    started.runner.in_house(lambda: names.append(threading.current_thread().name))
    assert names == ["house", "house"]
    started.runner.stop(STOPPED)
    started.runner.in_house(lambda: names.append(threading.current_thread().name))
    assert names[2] == threading.current_thread().name, "nobody keeps house"


def begin_anew(started: Started, served: threading.Event) -> None:
    def service() -> None:
        served.set()

    started.runner.run_again(
        vcpus=[started.loop], workers=[("disk", [IoSource(started.doorbell, service)])],
        console=Console(None, None), output=started.output,
    )


def test_a_run_begins_anew_after_its_end_paused(started: Started) -> None:
    served, over = threading.Event(), threading.Event()
    started.start()
    with pytest.raises(RuntimeError, match="only when it is over"):
        begin_anew(started, served)
    assert started.runner.stop(STOPPED) == STOPPED
    for _ in range(3):
        started.runner.when_over(over.set)
        begin_anew(started, served)
        assert state_of(started.runner) == (True, False)
        assert started.runner.wait(0.01) is None
        assert not started.runner.is_over
        os.eventfd_write(started.doorbell, 1)
        assert served.wait(patient(DEADLINE_S)), "devices go on in a pause"
        started.runner.resume()
        started.output.write(b"again ")
        assert started.runner.stop(END) == END
        assert over.is_set()
        served.clear()
        over.clear()
    assert bytes(started.printed) == b"again again again "


def test_an_end_that_was_due_can_be_taken_back(started: Started) -> None:
    deadline = started.runner.finish_after(0.05, END)
    started.start()
    started.runner.in_house(deadline.cancel)
    assert started.runner.wait(0.2) is None
