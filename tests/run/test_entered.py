"""A thread confines itself before it works, and whoever starts it hears of a refusal."""

from __future__ import annotations

import threading

import pytest

from pyvmm.errors import HostError
from pyvmm.run.entered import EnteredThread
from tests.support.patience import patient


def state_of(thread: EnteredThread) -> tuple[bool, bool]:
    return thread.has_begun, thread.is_alive


def test_a_thread_is_confined_by_itself_before_its_work() -> None:
    calls: list[tuple[str, str]] = []
    thread = EnteredThread(
        "worker", "snapshot", lambda: calls.append(("work", threading.current_thread().name))
    )
    assert state_of(thread) == (False, False)
    thread.join()  # nothing to wait for yet
    thread.start(lambda kind: calls.append((kind, threading.current_thread().name)))
    thread.wait()
    assert calls[0] == ("snapshot", "worker")
    thread.join(patient(10))
    assert calls == [("snapshot", "worker"), ("work", "worker")]
    assert state_of(thread) == (True, False)


def test_the_maker_waits_until_it_is_confined() -> None:
    may_enter, works = threading.Event(), threading.Event()
    thread = EnteredThread("worker", "snapshot", works.set)

    def enter(_kind: str) -> None:
        assert may_enter.wait(patient(10))

    thread.start(enter)
    threading.Timer(0.05, may_enter.set).start()
    thread.wait()
    assert may_enter.is_set()
    assert works.wait(patient(10))
    thread.join(patient(10))


def test_a_thread_that_is_not_confined_does_not_work() -> None:
    worked: list[bool] = []

    def refuse(kind: str) -> None:
        raise HostError(f"no filter for {kind}")

    thread = EnteredThread("worker", "snapshot", lambda: worked.append(True))
    thread.start(refuse)
    with pytest.raises(HostError, match="no filter for snapshot"):
        thread.wait()
    thread.join(patient(10))
    assert worked == []
    assert not thread.is_alive


def test_without_a_jail_it_just_works() -> None:
    works = threading.Event()
    thread = EnteredThread("worker", "snapshot", works.set)
    thread.start()
    thread.wait()
    assert works.wait(patient(10))
    thread.join(patient(10))


def test_a_lack_of_threads_is_the_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread = EnteredThread("worker", "snapshot", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostError, match="'worker' cannot be started: can't start new thread"):
            thread.start()
    thread.join()
