"""Snapshots, checkpoints and rewinds over the control socket, of a stand-in for a machine."""

from __future__ import annotations

import queue
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control.client import Client
from pyvmm.control.server import Server
from pyvmm.control.worker import MAX_WAITING
from pyvmm.errors import HostError, SnapshotError
from pyvmm.run.outcome import Kind, Outcome
from tests.support.patience import patient
from tests.support.stand_in_saves import StandInSaves, problem_of, saves_of
from tests.support.stand_in_target import Served, StandInTarget, served, wait_until


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as found:
        found.target.saves = StandInSaves(found.target)
        yield found


def test_a_snapshot_is_answered_with_its_number_and_told_by_status(rig: Served) -> None:
    client = rig.client()
    taken = client.call("snapshot", {"dir": "/a/b", "live": True, "diff": True})
    assert uuid.UUID(taken["id"])
    assert taken["path"] == "/a/b"
    assert saves_of(rig).done == ["snapshot /a/b live diff"]
    assert client.call("status")["snapshot"] == taken
    assert client.call("snapshot") == {"id": client.call("status")["snapshot"]["id"], "path": None}


def test_checkpoints_are_numbered(rig: Served) -> None:
    client = rig.client()
    assert [client.call("checkpoint")["number"] for _ in range(3)] == [1, 2, 3]
    assert client.call("status")["checkpoints"] == [1, 2, 3]


def test_other_requests_are_served_while_a_snapshot_is_written(rig: Served) -> None:
    saves = saves_of(rig)
    saves.may_go.clear()
    client = rig.client()
    pending = client.begin("snapshot", {"dir": "/a"})
    assert saves.has_begun.wait(patient(10))
    assert client.call("status")["snapshot"] is None
    assert rig.client().call("pause") == {"paused": True}
    assert not pending.done()
    saves.may_go.set()
    assert pending.result(patient(10))["path"] == "/a"
    assert saves.threads == {"control snapshot"}


def test_several_are_done_one_after_the_other(rig: Served) -> None:
    saves = saves_of(rig)
    saves.may_go.clear()
    first, second = rig.client(), rig.client()
    pending = [first.begin("snapshot", {"dir": "/1"})]
    assert saves.has_begun.wait(patient(10))
    pending.append(second.begin("checkpoint"))
    second.call("status")
    pending.append(first.begin("snapshot", {"dir": "/2"}))
    first.call("status")
    saves.may_go.set()
    for each in pending:
        each.result(patient(10))
    assert saves.done == ["snapshot /1", "checkpoint", "snapshot /2"]


def test_a_client_that_goes_takes_only_what_has_not_begun_with_it(rig: Served) -> None:
    saves = saves_of(rig)
    saves.may_go.clear()
    client = rig.client()
    client.begin("snapshot", {"dir": "/begun"})
    assert saves.has_begun.wait(patient(10))
    client.begin("snapshot", {"dir": "/waits"})
    client.call("status")
    client.close()
    other = rig.client()
    last = other.begin("snapshot", {"dir": "/other"})
    wait_until(lambda: rig.server.requests_under_way == 1)
    saves.may_go.set()
    last.result(patient(10))
    assert saves.done == ["snapshot /begun", "snapshot /other"]


def test_what_waits_is_bounded(rig: Served) -> None:
    saves = saves_of(rig)
    saves.may_go.clear()
    client = rig.client()
    pending = [client.begin("checkpoint") for _ in range(MAX_WAITING + 1)]
    error = problem_of(client.begin("checkpoint"))
    assert error.kind == "limit"
    saves.may_go.set()
    assert [each.result(patient(10))["number"] for each in pending] == [*range(1, 18)]


@pytest.mark.parametrize(("raised", "kind", "words"), [
    (SnapshotError("disk 0", "is written in place"), "snapshot", "disk 0: is written in place"),
    (HostError("no memory"), "host", "snapshot: no memory"),
    (OSError(28, "No space left on device"), "host", "No space left"),
    (KeyError("x"), "host", "internal error: KeyError"),
])
def test_an_error_is_the_answer_and_the_next_request_is_served(
    rig: Served, raised: Exception, kind: str, words: str
) -> None:
    saves = saves_of(rig)
    saves.error = raised
    client = rig.client()
    error = problem_of(client.begin("snapshot", {"dir": "/a"}))
    assert error.kind == kind
    assert words in str(error)
    if isinstance(raised, SnapshotError):
        assert error.details == {"subject": "disk 0", "problem": "is written in place"}
    saves.error = None
    assert client.call("checkpoint") == {"number": 1}


@pytest.mark.parametrize(("method", "params", "words"), [
    ("snapshot", {"dir": "a"}, "dir must be an absolute path"),
    ("snapshot", {"dir": 1}, "dir must be a text, not number"),
    ("snapshot", {"dir": "/" * 5000}, "dir has 5001 bytes"),
    ("snapshot", {"live": 1}, "live must be true or false, not number"),
    ("snapshot", {"way": 1}, "has no parameter 'way'"),
    ("rewind", {"number": -1}, "number must be an integer"),
    ("checkpoint", {"number": 1}, "has no parameter"),
])
def test_a_parameter_that_cannot_be_is_named(
    rig: Served, method: str, params: dict[str, object], words: str
) -> None:
    error = problem_of(rig.client().begin(method, params))
    assert error.kind == "params"
    assert words in str(error)


def test_a_machine_that_cannot_be_saved_says_so(tmp_path: Path) -> None:
    with served(tmp_path) as rig:
        error = problem_of(rig.client().begin("snapshot"))
        assert (error.kind, str(error)) == ("snapshot", "snapshot: this machine cannot be saved")


def test_a_rewind_is_told_to_all_with_the_new_number(rig: Served) -> None:
    events: list[dict[str, Any]] = []
    rig.client(on_event=events.append).call("subscribe", {"events": ["rewound", "state"]})
    client = rig.client()
    assert client.call("status")["clone_id"] is None
    assert problem_of(client.begin("rewind")).kind == "snapshot"
    client.call("checkpoint")
    told = client.call("rewind", {"number": 1})
    assert told == {"paused": False, "clone_id": str(rig.target.clone_id)}
    wait_until(lambda: len(events) == 3)
    assert sorted(event["event"] for event in events) == ["hello", "rewound", "state"]
    assert events[1]["clone_id"] == events[2]["clone_id"] == told["clone_id"]
    assert client.call("rewind")["clone_id"] != told["clone_id"]


def test_the_console_goes_on_over_a_rewind(rig: Served) -> None:
    client = rig.client()
    client.call("checkpoint")
    rig.target.print_out(b"before ")
    client.call("rewind")
    rig.target.print_out(b"after")
    assert client.call("status")["console_bytes"] == 12


# A run that ended, and its owner


class Owned:
    """A server with an owner, and the thread that runs its machine."""

    def __init__(self, target: StandInTarget) -> None:
        self.target = target
        ours, theirs = socket.socketpair()
        self.lines: list[str] = []
        self.server = Server(target, owner=theirs, report=self.lines.append)
        self.ends: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.events: list[dict[str, Any]] = []
        self.server.start()
        self.owner = Client(ours, on_event=self.events.append)
        self.owner.wait_hello(patient(10))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        """As ``pyvmm run`` does it."""
        is_again = True
        while is_again:
            self.target.finished.wait()
            outcome = self.target.outcome
            assert outcome is not None
            is_again = self.server.end(outcome)
            self.ends.put(is_again)

    def close(self) -> None:
        self.target.finish(Outcome(Kind.STOPPED))
        self.owner.close()
        self._thread.join(patient(20))
        assert not self._thread.is_alive()
        self.server.close()
        assert self.lines == []


@contextmanager
def owned() -> Iterator[Owned]:
    target = StandInTarget()
    target.saves = StandInSaves(target)
    found = Owned(target)
    try:
        yield found
    finally:
        found.close()


def ended(rig: Owned) -> list[str]:
    return [event["outcome"]["kind"] for event in rig.events if event["event"] == "ended"]


def test_an_end_is_taken_back_and_comes_again(tmp_path: Path) -> None:
    with owned() as rig:
        rig.owner.call("subscribe", {"events": ["ended", "rewound"]})
        rig.owner.call("checkpoint")
        for kind in (Kind.PANIC, Kind.RESET, Kind.PANIC):
            rig.target.finish(Outcome(kind))
            wait_until(lambda: rig.owner.call("outcome")["outcome"] is not None)
            assert problem_of(rig.owner.begin("pause")).kind == "ended"
            assert rig.owner.call("rewind")["paused"] is True
            assert rig.ends.get(timeout=patient(10)) is True
            assert rig.owner.call("outcome") == {"outcome": None}
            assert rig.owner.call("resume") == {"paused": False}
            assert rig.owner.call("wait", {"timeout_s": 0.01}) == {"outcome": None}
        rig.target.finish(Outcome(Kind.POWER_OFF))
        assert rig.owner.call("wait")["outcome"]["kind"] == "POWER_OFF"
        wait_until(lambda: ended(rig) == ["PANIC", "RESET", "PANIC", "POWER_OFF"])
        assert [event["event"] for event in rig.events].count("rewound") == 3


def test_an_ended_machine_waits_for_its_owner_only_if_it_can_be_rewound() -> None:
    with owned() as rig:
        rig.owner.call("subscribe", {"events": ["ended"]})
        rig.target.finish(Outcome(Kind.RESET))
        assert rig.ends.get(timeout=patient(10)) is False
    with owned() as rig:
        rig.owner.call("subscribe", {"events": ["ended"]})
        rig.owner.call("checkpoint")
        rig.target.finish(Outcome(Kind.RESET))
        wait_until(lambda: ended(rig) == ["RESET"])
        time.sleep(0.2)
        assert rig.ends.empty()
        rig.owner.close()
        assert rig.ends.get(timeout=patient(10)) is False


def test_a_snapshot_under_way_is_finished_before_the_machine_goes() -> None:
    with owned() as rig:
        saves = rig.target.saves
        assert isinstance(saves, StandInSaves)
        saves.may_go.clear()
        pending = rig.owner.begin("snapshot", {"dir": "/last"})
        assert saves.has_begun.wait(patient(10))
        rig.target.finish(Outcome(Kind.RESET))
        time.sleep(0.2)
        assert rig.ends.empty()
        saves.may_go.set()
        assert pending.result(patient(10))["path"] == "/last"
        assert saves.done == ["snapshot /last"]


# The agent of a clone
