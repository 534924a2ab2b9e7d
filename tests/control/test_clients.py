"""Clients that break the rules, read nothing or go away: the server and the run go on."""

from __future__ import annotations

import array
import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control import connection, server
from pyvmm.control.client import Client, ControlError
from pyvmm.control.messages import MAX_FDS, MAX_LINE_BYTES
from pyvmm.errors import ConfigError
from pyvmm.vhost_user.listener import Listener
from tests.support.patience import patient
from tests.support.stand_in_target import Served, open_descriptors, served, wait_until


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as found:
        yield found
        assert found.target.outcome is None
        assert found.client().call("status")["cpus"] == 2


class Raw:
    """A socket to the server, for lines that ``Client`` would never send."""

    def __init__(self, rig: Served) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(patient(10))
        self.socket.connect(str(rig.path))
        self._file = self.socket.makefile("rb")
        assert self.read()["event"] == "hello"

    def send(self, line: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([line], rights)
        if sent < len(line):
            self.socket.sendall(line[sent:])

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file.readline())
        return found

    def is_hung_up(self) -> bool:
        try:
            return self._file.readline() == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@pytest.fixture
def raw(rig: Served) -> Iterator[Raw]:
    found = Raw(rig)
    yield found
    found.close()


@pytest.mark.parametrize(("line", "number", "words"), [
    (b"hello", None, "the line is not JSON"),
    (b"", None, "the line is not JSON"),
    (b"\xff\xfe{}", None, "byte 0 of the line is not UTF-8"),
    (b"[" * 100_000, None, "nested too deeply"),
    (b'{"id":' + b"1" * 10_000 + b"}", None, "the line is not JSON"),
    (b"[1]", None, "is a JSON array, not an object"),
    (b"null", None, "is a JSON null, not an object"),
    (b"{}", None, "id must be an integer"),
    (b'{"id":-1,"method":"status"}', None, "id must be an integer"),
    (b'{"id":1.0,"method":"status"}', None, "id must be an integer"),
    (b'{"id":true,"method":"status"}', None, "id must be an integer"),
    (b'{"id":NaN,"method":"status"}', None, "NaN is no JSON number"),
    (b'{"id":5}', 5, "request 5: method must be a text, not null"),
    (b'{"id":5,"method":[]}', 5, "method must be a text, not array"),
    (b'{"id":5,"method":"status","params":[]}', 5, "params must be an object, not array"),
    (b'{"id":5,"method":"status","parms":{}}', 5, "'parms' is unknown"),
    (b'{"id":5,"method":"status","fds":17}', 5, "fds must be a number of descriptors"),
    (b'{"id":5,"method":"status","fds":1}', 5, "0 descriptors came, not 1"),
    (b'{"id":5,"method":"agent.run","params":{"argv":["\\ud800"]}}', 5, "half of a surrogate"),
])
def test_a_line_that_is_no_request_gets_one_answer_that_names_it(
    raw: Raw, line: bytes, number: int | None, words: str
) -> None:
    raw.send(line + b"\n")
    answer = raw.read()
    assert answer["id"] == number
    assert words in answer["error"]["message"]
    raw.send(b'{"id":6,"method":"outcome"}\n')
    assert raw.read() == {"id": 6, "result": {"outcome": None}}


def test_a_line_over_the_limit_ends_the_connection(raw: Raw) -> None:
    try:
        raw.send(b"x" * (MAX_LINE_BYTES + 70_000))
    except (BrokenPipeError, ConnectionResetError):
        return  # hung up while we wrote
    assert f"more than {MAX_LINE_BYTES} bytes" in raw.read()["error"]["message"]
    assert raw.is_hung_up()


def test_a_line_at_the_limit_is_read(raw: Raw) -> None:
    line = b'{"id":1,"method":"outcome"'
    raw.send(line + b" " * (MAX_LINE_BYTES - len(line) - 1) + b"}\n")
    assert raw.read()["result"] == {"outcome": None}


def test_lines_may_come_in_any_pieces(raw: Raw) -> None:
    lines = b"".join(b'{"id":%d,"method":"outcome"}\n' % number for number in range(100))
    chance = random.Random(3)
    while lines:
        length = chance.randrange(1, 200)
        raw.send(lines[:length])
        lines = lines[length:]
    assert [raw.read()["id"] for _ in range(100)] == list(range(100))


def test_one_request_number_is_under_way_once(raw: Raw) -> None:
    raw.send(b'{"id":1,"method":"wait"}\n{"id":1,"method":"status"}\n')
    assert "request 1 is under way already" in raw.read()["error"]["message"]


def test_requests_under_way_are_bounded(raw: Raw) -> None:
    for number in range(connection.MAX_REQUESTS):
        raw.send(b'{"id":%d,"method":"wait"}\n' % number)
    raw.send(b'{"id":999,"method":"status"}\n')
    answer = raw.read()
    assert (answer["id"], answer["error"]["kind"]) == (999, "limit")


def test_clients_are_bounded(rig: Served) -> None:
    clients = [rig.client() for _ in range(server.MAX_CLIENTS)]
    with pytest.raises(ControlError, match="16 clients are connected already"):
        rig.client()
    clients[0].close()
    wait_until(lambda: _connects(rig))


def _connects(rig: Served) -> bool:
    try:
        rig.client().close()
    except ControlError:
        return False
    return True


@pytest.mark.parametrize(("fds", "line"), [
    (1, b'{"id":1,"method":"status"}\n'),
    (1, b"no JSON\n"),
    (MAX_FDS + 1, b'{"id":1,"method":"status","fds":16}\n'),
    (200, b'{"id":1,"method":"status"}\n'),
])
def test_descriptors_that_nobody_asked_for_are_closed_and_end_the_connection(
    rig: Served, raw: Raw, fds: int, line: bytes
) -> None:
    before = open_descriptors()
    raw.send(line, [0] * fds)
    while "the connection is closed" not in (answer := raw.read()).get(
        "error", {}
    ).get("message", ""):
        assert answer["id"] in (None, 1)
    assert raw.is_hung_up()
    wait_until(lambda: open_descriptors() < before)


def test_descriptors_that_no_parameter_names_are_closed(rig: Served) -> None:
    client = rig.client()
    before = open_descriptors()
    for _ in range(20):
        client.call("status", {}, [0] * MAX_FDS)
        with pytest.raises(ControlError):
            client.call("no-such", {}, [0, 0])
        with pytest.raises(ControlError):
            client.call("agent.put", {"path": "/", "fd": 0, "more": 1}, [0, 0])
    assert open_descriptors() <= before


def test_a_subscriber_that_does_not_read_loses_bytes_and_no_memory(rig: Served, raw: Raw) -> None:
    raw.send(b'{"id":1,"method":"subscribe","params":{"events":["console"]}}\n')
    assert raw.read()["result"]["at"] == 0
    total = 0
    for _ in range(400):
        rig.target.print_out(b"z" * 50_000)
        total += 50_000
    heard = lost = 0
    while heard + lost < total:
        event = raw.read()
        if event["event"] == "console.lost":
            lost += event["bytes"]
        else:
            assert event["at"] == heard + lost
            heard += len(event["data"]) // 4 * 3 - event["data"].count("=")
    assert lost > 0
    assert heard >= 4 << 20
    assert rig.client().call("status")["console_bytes"] == total


def test_a_subscriber_that_does_not_read_gets_the_last_of_many_states(
    rig: Served, raw: Raw
) -> None:
    raw.send(b'{"id":1,"method":"subscribe","params":{"events":["state"]}}\n')
    assert raw.read()["result"]["paused"] is False
    client, changes = rig.client(), 4001
    for index in range(changes):
        client.call("resume" if index % 2 else "pause")
    told, quiet = [], patient(0.5)
    raw.socket.settimeout(quiet)
    with contextlib.suppress(TimeoutError):
        while True:
            told.append(raw.read())
    assert 100 < len(told) < changes
    assert told[-1]["paused"] is True


def test_a_client_that_reads_no_answers_is_not_read_either(rig: Served, raw: Raw) -> None:
    """Until it is hung up (STALL_S), it costs a bounded backlog."""
    line = b'{"id":1,"method":"memory.read","params":{"gpa":0,"length":500000}}\n'
    a_while = 0.5
    raw.socket.settimeout(a_while)
    with pytest.raises(TimeoutError):
        raw.socket.sendall(line * 100_000)
    assert rig.client().call("outcome") == {"outcome": None}


def test_a_client_that_never_takes_what_waits_is_hung_up(
    rig: Served, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.1)
    line = b'{"id":1,"method":"memory.read","params":{"gpa":0,"length":500000}}\n'
    for _ in range(5):
        raw.send(line)
    before = open_descriptors()
    wait_until(lambda: open_descriptors() == before - 1)


def test_clients_that_come_and_go_leave_nothing_behind(rig: Served) -> None:
    rig.client().call("status")
    before = open_descriptors()
    for turn in range(50):
        raw = Raw(rig)
        raw.send(b'{"id":1,"method":"wait"}\n{"id":2,"method":"pause"}\n{"id":3,"met'[: 20 + turn])
        raw.close()
    wait_until(lambda: open_descriptors() <= before)


# The socket's path


def test_a_path_in_use_is_refused_and_a_stale_one_taken_over(rig: Served, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is in use: somebody listens on it"):
        Listener(str(rig.path))
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    Listener(str(stale)).close()
    assert not stale.exists()


# The client


def test_a_server_that_lies_or_hangs_up_is_one_clear_error() -> None:
    for words, said in (
        (b"garbage\n", "the server lies: the line is not JSON"),
        (b"", "the machine's process has ended the connection"),
        (b'{"event":"hello","protocol":2}\n', "speaks version 2 of the control protocol, not 1"),
        (b'{"id":null,"error":{"kind":"limit","message":"too many"}}\n', "too many"),
    ):
        ours, theirs = socket.socketpair()
        theirs.sendall(words)
        theirs.shutdown(socket.SHUT_WR)
        with theirs, Client(ours) as client, pytest.raises(ControlError, match=said) as caught:
            client.wait_hello(patient(5))
        assert caught.value.kind == "closed"


def test_a_server_that_says_nothing_is_not_waited_for_for_ever() -> None:
    ours, theirs = socket.socketpair()
    client = Client(ours)
    with theirs, pytest.raises(ControlError, match=r"has said nothing for 0\.05 s"):
        client.wait_hello(0.05)
    client.close()


def test_what_is_under_way_ends_with_the_connection(rig: Served) -> None:
    client = rig.client()
    pending = client.begin("wait")
    client.close()
    with pytest.raises(ControlError):
        pending.result(patient(5))
    with pytest.raises(ControlError) as caught:
        client.call("status")
    assert caught.value.kind == "closed"


def test_a_call_may_have_a_time_limit(rig: Served) -> None:
    client = rig.client()
    began_s = time.monotonic()
    with pytest.raises(ControlError, match=r"wait: no answer for 0.05 s"):
        client.call("wait", timeout_s=0.05)
    assert time.monotonic() - began_s < patient(5)


def test_a_client_may_hang_up_in_an_event(rig: Served) -> None:
    before = open_descriptors()
    clients: list[Client] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "state":
            clients[0].close()

    clients.append(Client.connect(str(rig.path), on_event=on_event))
    clients[0].call("subscribe", {"events": ["state"]})
    rig.client().call("pause")
    wait_until(lambda: clients[0].is_closed)
    rig.clients.pop().close()
    wait_until(lambda: open_descriptors() <= before)
