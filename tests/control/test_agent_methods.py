"""The agent's methods through the server, with a stand-in for the port and the guest behind it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control.client import Client, ControlError, Pending
from pyvmm.run.outcome import Kind, Outcome
from tests.support.patience import patient
from tests.support.stand_in_port import StandInPort
from tests.support.stand_in_target import Served, served, wait_until


@pytest.fixture
def port() -> Iterator[StandInPort]:
    found = StandInPort()
    yield found
    found.close()


@pytest.fixture
def rig(tmp_path: Path, port: StandInPort) -> Iterator[Served]:
    with served(tmp_path, port) as found:
        yield found


@pytest.fixture
def ready(rig: Served, port: StandInPort) -> Client:
    """A client of a machine whose agent is ready."""
    port.open()
    client = rig.client()
    assert client.call("agent.wait")["text"] == "stand-in"
    return client


class Reader:
    """The reading end of a new pipe, read to its end by a thread."""

    def __init__(self) -> None:
        self._fd, self.given = os.pipe()
        self.data = b""
        self.count = 0
        self._thread = threading.Thread(target=self._read, daemon=True)

    def start(self) -> None:
        os.close(self.given)
        self._thread.start()

    def _read(self) -> None:
        while piece := os.read(self._fd, 1 << 16):
            self.count += len(piece)
            self.data = (self.data + piece)[-1000:]
        os.close(self._fd)

    def join(self) -> bytes:
        self._thread.join(patient(20))
        return self.data


def begin(client: Client, *argv: str, given: bytes | None = None) -> tuple[Pending, Reader, Reader]:
    out, err = Reader(), Reader()
    fds, params = [out.given, err.given], {"argv": argv, "stdout": 0, "stderr": 1}
    stdin = -1
    if given is not None:
        reads, stdin = os.pipe()
        fds.append(reads)
        params["stdin"] = 2
    pending = client.begin("agent.run", params, fds)
    if given is not None:
        os.close(fds[2])

        def write() -> None:
            with contextlib.suppress(BrokenPipeError), os.fdopen(stdin, "wb") as pipe:
                pipe.write(given)

        threading.Thread(target=write, daemon=True).start()
    out.start()
    err.start()
    return pending, out, err


def test_a_commands_streams_are_apart(ready: Client) -> None:
    pending, out, err = begin(ready, "both", "to out", "to err")
    assert pending.result(patient(10)) == {
        "kind": "exited", "value": 3, "timed_out": False, "reason": "",
    }
    assert (out.join(), err.join()) == (b"to out", b"to err")


def test_bytes_that_are_no_utf_8_reach_the_command(ready: Client) -> None:
    word = b"\xff\xfe".decode(errors="surrogateescape")
    pending, out, err = begin(ready, "echo", word)
    assert pending.result(patient(10))["value"] == 0
    assert out.join() == b"\xff\xfe"
    err.join()


def test_input_flows_through_and_back(ready: Client) -> None:
    data = os.urandom(3_000_000)
    pending, out, err = begin(ready, "cat", given=data)
    assert pending.result(patient(30))["value"] == 0
    assert out.join() == data[-1000:]
    assert out.count == len(data)
    err.join()


def test_several_commands_go_on_at_once_and_a_stuck_one_holds_up_none(ready: Client) -> None:
    stuck_reads, stuck_writes = os.pipe()
    stuck = ready.begin("agent.run", {"argv": ["flood", "10000000"], "stdout": 0}, [stuck_writes])
    os.close(stuck_writes)
    pending, out, err = begin(ready, "flood", "5000000")
    assert pending.result(patient(30))["value"] == 0
    out.join()
    err.join()
    assert out.count == 5_000_000
    assert not stuck.done()
    count = 0
    while piece := os.read(stuck_reads, 1 << 20):
        count += len(piece)
    assert count == 10_000_000
    assert stuck.result(patient(10))["value"] == 0
    os.close(stuck_reads)


def test_what_nobody_reads_waits_in_the_guest(ready: Client, port: StandInPort) -> None:
    """1 GiB would take as little memory: no credit comes back for what the pipe does not take."""
    reads, writes = os.pipe()
    pending = ready.begin("agent.run", {"argv": ["flood", "1000000000"], "stdout": 0}, [writes])
    os.close(writes)
    assert ready.call("agent.ping")["seconds"] < patient(10)
    assert not pending.done()
    ready.call("agent.kill", {"request": pending.id, "signal": 9})
    taken = 0
    while piece := os.read(reads, 1 << 20):
        taken += len(piece)
    os.close(reads)
    assert pending.result(patient(10))["kind"] == "signalled"
    assert taken <= (64 << 10) + (64 << 10)  # a pipe's, and the window's


def test_a_command_whose_reader_goes_away_gets_sigpipe(ready: Client, port: StandInPort) -> None:
    reads, writes = os.pipe()
    pending = ready.begin("agent.run", {"argv": ["flood", "1000000000"], "stdout": 0}, [writes])
    os.close(writes)
    os.read(reads, 100)
    os.close(reads)
    assert pending.result(patient(10)) == {
        "kind": "signalled", "value": 13, "timed_out": False, "reason": "",
    }


def test_output_that_nobody_wants_is_dropped(ready: Client) -> None:
    assert ready.call("agent.run", {"argv": ["flood", "3000000"]})["value"] == 0


def test_a_job_is_killed_by_its_number_and_by_its_own_client_alone(
    rig: Served, ready: Client, port: StandInPort
) -> None:
    pending = ready.begin("agent.run", {"argv": ["sleep"]})
    with pytest.raises(ControlError, match=r"request \d+ is no job under way"):
        rig.client().call("agent.kill", {"request": pending.id, "signal": 15})
    ready.call("agent.kill", {"request": pending.id, "signal": 15})
    assert pending.result(patient(10))["value"] == 15


def test_the_jobs_of_a_client_that_goes_away_are_killed(
    rig: Served, ready: Client, port: StandInPort
) -> None:
    other = rig.client()
    other.begin("agent.run", {"argv": ["sleep"]})
    _, out, err = begin(other, "flood", "1000000000")
    wait_until(lambda: out.count > 0)
    other.close()
    wait_until(lambda: len(port.killed) == 2)
    assert {signal for _, signal in port.killed} == {9}
    out.join()
    err.join()
    assert ready.call("agent.run", {"argv": ["echo"]})["value"] == 0


def test_files_go_in_and_out(ready: Client, port: StandInPort) -> None:
    data = os.urandom(500_000)

    def put(method: str, path: str) -> dict[str, Any]:
        reads, writes = os.pipe()
        pending = ready.begin(method, {"path": path, "fd": 0}, [reads])
        os.close(reads)
        with os.fdopen(writes, "wb") as pipe:
            pipe.write(data)
        return pending.result(patient(10))

    def get(method: str, path: str) -> bytes:
        reads, writes = os.pipe()
        pending = ready.begin(method, {"path": path, "fd": 0}, [writes])
        os.close(writes)
        with os.fdopen(reads, "rb") as pipe:
            found = pipe.read()
        assert pending.result(patient(10))["kind"] == "exited"
        return found

    assert put("agent.write", "/f")["value"] == 0
    assert put("agent.put", "/d")["value"] == 0
    assert port.files == {"/f": data, "/d": data}
    assert get("agent.read", "/f") == data
    assert get("agent.get", "/d") == data


def test_an_agent_that_cannot_says_why(ready: Client) -> None:
    result = ready.call("agent.run", {"argv": ["no-such"]})
    assert (result["kind"], result["value"], result["reason"]) == (
        "failed", 2, "no such program"
    )


@pytest.mark.parametrize(("method", "params", "words"), [
    ("agent.put", {"path": "relative"}, "must begin with /"),
    ("agent.run", {"argv": [""]}, "needs a program"),
])
def test_a_job_that_the_agent_could_never_do_is_refused(
    ready: Client, method: str, params: dict[str, object], words: str
) -> None:
    reads, writes = os.pipe()
    try:
        given = {} if method == "agent.run" else {"fd": 0}
        with pytest.raises(ControlError, match=words) as caught:
            ready.call(method, {**params, **given}, [reads] if given else [])
        assert caught.value.kind == "agent"
    finally:
        os.close(reads)
        os.close(writes)


def test_a_descriptor_must_be_a_pipe_or_a_socket(ready: Client, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(ControlError) as caught:
        ready.call("agent.run", {"argv": ["echo"], "stdout": 0}, [file.fileno()])
    assert "neither a pipe nor a socket" in str(caught.value)
    assert os.get_blocking(0)


def test_one_descriptor_has_one_use(ready: Client) -> None:
    reads, writes = os.pipe()
    with pytest.raises(ControlError, match="another parameter has already"):
        ready.call("agent.run", {"argv": ["echo"], "stdout": 0, "stderr": 0}, [writes])
    os.close(reads)
    os.close(writes)


def test_an_agent_that_lies_loses_the_link_and_its_jobs_say_so(
    ready: Client, port: StandInPort
) -> None:
    sleeping = ready.begin("agent.run", {"argv": ["sleep"]})
    lying = ready.begin("agent.run", {"argv": ["lie"]})
    for pending in (sleeping, lying):
        result = pending.result(patient(10))
        assert result["kind"] == "lost"
        assert "a frame of unknown type 99" in result["reason"]
    status = ready.call("status")
    assert (status["agent"], status["problem"]) == ("lost", result["reason"])
    assert port.hang_ups == 1
    with pytest.raises(ControlError, match="unknown type 99") as caught:
        ready.call("agent.run", {"argv": ["echo"]})
    assert caught.value.kind == "agent"
    port.shut()
    port.open()
    assert ready.call("agent.wait", {"timeout_s": patient(10)})["text"] == "stand-in"
    assert ready.call("agent.run", {"argv": ["echo"]})["value"] == 0


def test_subscribers_hear_of_the_agent(rig: Served, port: StandInPort) -> None:
    events: list[dict[str, Any]] = []
    rig.client(on_event=events.append).call("subscribe", {"events": ["state"]})
    port.open()
    wait_until(lambda: [event.get("agent") for event in events[1:]] == ["ready"])
    port.shut()
    wait_until(lambda: len(events) == 3)
    assert events[2]["agent"] == "lost"
    assert "closed its port" in events[2]["problem"]


def test_a_wait_for_an_agent_that_does_not_come_says_what_to_do(rig: Served) -> None:
    with pytest.raises(ControlError) as caught:
        rig.client().call("agent.wait", {"timeout_s": 0.05})
    assert "no agent came forward within 0.05 s: the image has" in str(caught.value)
    assert caught.value.kind == "timeout"
    assert "pyvmm run --agent" in str(caught.value)


def test_the_end_of_the_run_ends_every_job(rig: Served, ready: Client) -> None:
    pending = ready.begin("agent.run", {"argv": ["sleep"]})
    ready.call("status")
    rig.target.finish(Outcome(Kind.POWER_OFF))
    rig.end()
    assert pending.result(patient(10))["kind"] == "lost"


def test_a_wait_for_the_agent_ends_with_the_run(rig: Served) -> None:
    client = rig.client()
    pending = client.begin("agent.wait", {"timeout_s": None})
    client.call("status")
    rig.target.finish(Outcome(Kind.POWER_OFF))
    rig.end()
    with pytest.raises(ControlError, match="the run has ended before an agent came forward"):
        pending.result(patient(10))


def test_a_guest_that_reads_nothing_holds_up_nobody(
    rig: Served, ready: Client, port: StandInPort
) -> None:
    port.is_deaf = True
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    pending = ready.begin("agent.run", {"argv": ["cat"], "stdin": 0}, [reads])
    os.close(reads)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while written < 10_000_000:
            written += os.write(writes, bytes(1 << 16))
            ready.call("status")
    assert written < 1_000_000
    with pytest.raises(ControlError, match="has not answered within"):
        ready.call("agent.ping", {"timeout_s": 0.05})
    port.hear()
    os.close(writes)
    assert pending.result(patient(20))["value"] == 0


def test_jobs_of_all_clients_are_bounded(ready: Client) -> None:
    """By the agent's own number, which counts those that it still has."""
    running = [ready.begin("agent.run", {"argv": ["sleep"]}) for _ in range(16)]
    with pytest.raises(ControlError, match="16 jobs, as many as it takes"):
        ready.call("agent.run", {"argv": ["echo"]})
    ready.call("agent.kill", {"request": running[0].id, "signal": 9})
    running[0].result(patient(10))
    assert ready.call("agent.run", {"argv": ["echo"]})["value"] == 0
