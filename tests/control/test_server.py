"""The control server on a stand-in for a machine: its methods, its events, its end."""

from __future__ import annotations

import base64
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control.client import ControlError
from pyvmm.control.connection import Call
from pyvmm.run.outcome import Kind, Outcome
from tests.support.patience import patient
from tests.support.stand_in_target import MEMORY_BYTES, Served, served, wait_until


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as found:
        yield found


def refused(rig: Served, method: str, params: dict[str, object]) -> ControlError:
    with pytest.raises(ControlError) as caught:
        rig.client().call(method, params)
    return caught.value


def text(event: dict[str, Any]) -> bytes:
    return base64.b64decode(event["data"])


def test_the_socket_is_its_owners_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    with served(tmp_path) as rig:
        assert rig.path.stat().st_mode & 0o777 == 0o600
    assert not rig.path.exists()


def test_status_tells_of_the_machine(rig: Served) -> None:
    status = rig.client().call("status")
    assert status["kernel"] == "stand-in"
    assert status["cpus"] == 2
    assert status["paused"] is False
    assert status["agent"] == "none"
    assert status["outcome"] is None
    assert 0 <= status["running_s"] < patient(60)


def test_a_pause_is_answered_once_the_guest_rests(rig: Served) -> None:
    rig.target.is_stuck = True
    client = rig.client()
    pending = client.begin("pause", {"timeout_s": 60})
    assert client.call("status")["paused"] is True
    assert not pending.done()
    rig.target.is_stuck = False
    assert pending.result(patient(10)) == {"paused": True}
    assert client.call("resume") == {"paused": False}


def test_a_pause_that_takes_too_long_stays_asked_for(rig: Served) -> None:
    rig.target.is_stuck = True
    error = refused(rig, "pause", {"timeout_s": 0.05})
    assert error.kind == "timeout"
    assert "stays asked for" in str(error)
    assert rig.target.is_paused


def test_a_pause_that_another_client_takes_back_is_a_state_error(rig: Served) -> None:
    rig.target.is_stuck = True
    client = rig.client()
    pending = client.begin("pause", {"timeout_s": None})
    rig.client().call("resume")
    with pytest.raises(ControlError, match="another client has resumed"):
        pending.result(patient(10))


def test_registers_are_those_of_a_guest_at_rest(rig: Served) -> None:
    error = refused(rig, "registers", {"vcpu": 1})
    assert error.kind == "state"
    assert "pause it first" in str(error)
    client = rig.client()
    client.call("pause")
    found = client.call("registers", {"vcpu": 1})
    assert found["values"]["rax"] == "0x1"
    assert found["values"]["rip"] == "0xffffffffffffffff"  # beyond what JSON libraries keep exact
    assert found["text"].startswith("rax 0x1 ")


@pytest.mark.parametrize(("method", "params", "words"), [
    ("registers", {"vcpu": 2}, "vcpu must be an integer of 0 to 1"),
    ("memory.read", {"gpa": MEMORY_BYTES, "length": 1}, "is not RAM"),
    ("memory.read", {"gpa": 0, "length": (512 << 10) + 1}, "length must be an integer"),
    ("memory.read", {"gpa": -1, "length": 1}, "gpa must be an integer"),
    ("memory.read", {"gpa": True, "length": 1}, "gpa must be an integer"),
    ("memory.read", {}, "gpa is missing"),
    ("console.write", {"data": "%"}, "data is not base64"),
    ("console.write", {"data": 1}, "data must be base64 text, not number"),
    ("status", {"verbose": True}, "status: has no parameter 'verbose'"),
    ("pause", {"timeout_s": "1"}, "must be a number of seconds, not text"),
    ("pause", {"timeout_s": -1}, "must be 0 to"),
    ("subscribe", {"events": []}, "events must be an array of at least 1"),
    ("subscribe", {"events": ["consol"]}, "has 'consol'; there are console, state, ended"),
    ("subscribe", {"events": ["console"], "console_from": 1}, "at most 0, the console's end"),
    ("agent.kill", {"request": 1, "signal": 65}, "signal must be an integer of 1 to 64"),
    ("agent.run", {"argv": []}, "argv must be an array of at least 1"),
    ("agent.run", {"argv": ["a\0"]}, "argv[0] has a NUL"),
    ("agent.run", {"argv": ["a"], "env": {"A=": "b"}}, "has a name that cannot be one: 'A='"),
    ("agent.run", {"argv": ["a"], "stdin": 0}, "stdin must be the index of one of the 0"),
])
def test_a_parameter_that_cannot_be_is_named(
    rig: Served, method: str, params: dict[str, object], words: str
) -> None:
    error = refused(rig, method, params)
    assert error.kind == "params"
    assert words in str(error)


def test_an_unknown_method_is_named_with_those_there_are(rig: Served) -> None:
    error = refused(rig, "statsu", {})
    assert error.kind == "method"
    assert "'statsu' is no method; there are subscribe, status, pause" in str(error)


def test_memory_is_read_while_the_guest_runs(rig: Served) -> None:
    found = rig.client().call("memory.read", {"gpa": 3, "length": 4})
    assert base64.b64decode(found["data"]) == b"\x03\x04\x05\x06"
    assert rig.client().call("memory.read", {"gpa": 0, "length": 512 << 10})


def test_typed_bytes_are_bounded(rig: Served) -> None:
    client = rig.client()
    client.call("console.write", {"data": base64.b64encode(b"ls\n").decode()})
    assert rig.target.typed == b"ls\n"
    rig.target.typed = bytes(1 << 20)
    error = refused(rig, "console.write", {"data": base64.b64encode(b"x").decode()})
    assert error.kind == "limit"


def test_refresh_reaches_the_disks(rig: Served) -> None:
    rig.client().call("disks.refresh")
    assert rig.target.refreshed == 1


def test_a_subscriber_gets_all_of_the_console_in_order(rig: Served) -> None:
    heard = bytearray()
    is_all = threading.Event()

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "console":
            assert event["at"] == len(heard)
            heard.extend(text(event))
            if heard.endswith(b"last"):
                is_all.set()

    rig.target.print_out(b"first ")
    client = rig.client(on_event=on_event)
    assert client.call("subscribe", {"events": ["console"], "console_from": 0})["at"] == 0
    for _ in range(100):
        rig.target.print_out(b"y" * 10_000)
    rig.target.print_out(b"last")
    assert is_all.wait(patient(20))
    assert heard == b"first " + b"y" * 1_000_000 + b"last"
    assert text(client.call("console.text", {"limit": 6})) == b"yylast"


def test_a_subscriber_hears_only_of_its_events(rig: Served) -> None:
    events: list[dict[str, Any]] = []
    client = rig.client(on_event=events.append)
    client.call("subscribe", {"events": ["state"]})
    rig.target.print_out(b"not heard")
    client.call("pause")
    client.call("resume")
    wait_until(lambda: len(events) == 3)
    assert [event["event"] for event in events] == ["hello", "state", "state"]
    assert [event["paused"] for event in events[1:]] == [True, False]


def test_a_pause_by_the_keyboard_is_told_too(rig: Served) -> None:
    events: list[dict[str, Any]] = []
    rig.client(on_event=events.append).call("subscribe", {"events": ["state"]})
    rig.target.is_paused = True
    rig.target.woken()
    wait_until(lambda: len(events) == 2)
    assert events[1]["paused"] is True


def test_a_client_that_asks_for_a_year_and_goes_leaves_nothing(rig: Served) -> None:
    client = rig.client()
    for _ in range(10):
        client.begin("wait", {"timeout_s": 366 * 86400})
    client.call("status")
    client.close()

    def is_forgotten() -> bool:
        gc.collect()
        return not any(isinstance(one, Call) and one.method == "wait" for one in gc.get_objects())

    wait_until(is_forgotten)


def test_the_end_answers_all_who_wait_and_comes_behind_the_console(rig: Served) -> None:
    events: list[dict[str, Any]] = []
    client = rig.client(on_event=events.append)
    client.call("subscribe", {"events": ["console", "ended"], "console_from": 0})
    waiting = rig.client().begin("wait")
    assert rig.client().call("wait", {"timeout_s": 0.01}) == {"outcome": None}
    stopping = client.begin("stop")
    assert rig.target.finished.wait(patient(10))
    rig.target.print_out(b"last words\n" * 100_000)
    rig.end()
    assert waiting.result(patient(10))["outcome"]["kind"] == "STOPPED"
    assert stopping.result(patient(10))["outcome"]["exit_status"] == 0
    wait_until(lambda: client.is_closed)
    printed = b"".join(text(event) for event in events if event["event"] == "console")
    assert printed == b"last words\n" * 100_000
    ended = events[-1]
    assert ended["event"] == "ended"
    assert ended["outcome"]["text"] == "stopped by the script"
    assert ended["evidence"]["panic"] is None
    assert ended["kernel"]["release"] == "1.0"
    assert len(ended["registers"]) == len(ended["register_values"]) == 2
    assert not rig.path.exists()


def test_a_panic_is_told_with_its_reason(rig: Served) -> None:
    client = rig.client()
    waiting = client.begin("wait")
    client.call("status")
    rig.target.finish(Outcome(Kind.PANIC, detail="Attempted to kill init!"))
    rig.end()
    outcome = waiting.result(patient(10))["outcome"]
    assert outcome == {
        "kind": "PANIC", "value": 0, "detail": "Attempted to kill init!", "exit_status": 121,
        "text": "kernel panic: Attempted to kill init!",
    }


def test_a_client_is_let_go_at_the_end(rig: Served) -> None:
    client = rig.client()
    client.call("status")
    rig.target.finish(Outcome(Kind.RESET))
    rig.end()
    wait_until(lambda: client.is_closed)
    with pytest.raises(ControlError) as caught:
        client.call("status")
    assert caught.value.kind == "closed"
