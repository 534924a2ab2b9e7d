"""``pyvmm run --control`` and ``pyvmm ps`` as a user runs them, with guests of a few bytes."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.cli import ps
from pyvmm.control.client import Client, ControlError
from pyvmm.errors import ConfigError
from tests.support.guest import command, environment
from tests.support.patience import patient
from tests.support.stand_in_target import wait_until
from tests.support.terminal import Terminal
from tests.support.tiny_guests import (
    HALT,
    REPORT_7,
    SPIN,
    TRIPLE_FAULT,
    echoes,
    prints,
    prints_for_ever,
    write_guest,
)

bare = pytest.mark.bare


class Run:
    """A ``pyvmm run --control`` of a guest of ``code``."""

    def __init__(self, folder: Path, *code: bytes, options: tuple[str, ...] = ()) -> None:
        self.path = folder / "control"
        kernel = write_guest(folder / "guest.elf", *code)
        self.process = subprocess.Popen(
            command("--console", "none", "--control", str(self.path), *options, kernel=kernel),
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(), cwd=folder,
        )
        wait_until(lambda: self.path.exists() or self.process.poll() is not None, 20)

    def client(self, **given: Any) -> Client:
        until_s = time.monotonic() + patient(20)
        while True:
            try:
                return Client.connect(str(self.path), timeout_s=patient(20), **given)
            except ControlError:  # the socket of a machine that was killed
                assert time.monotonic() < until_s
                time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and standard error."""
        _, messages = self.process.communicate(timeout=patient(30))
        return self.process.returncode, messages.decode()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def spinning(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path, SPIN, options=("--memory", "64M")) as run:
        yield run


@bare
def test_a_guest_is_driven_from_outside(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    with Run(tmp_path, prints(b"hello\n"), echoes()) as run, run.client(
        on_event=events.append
    ) as client:
        client.call("subscribe", {"events": ["console", "ended"], "console_from": 0})
        client.call("console.write", {"data": base64.b64encode(b"typed").decode()})

        def printed() -> bytes:
            return b"".join(base64.b64decode(event["data"]) for event in list(events)
                            if event["event"] == "console")

        wait_until(lambda: printed() == b"hello\ntyped", 20)
        assert client.call("pause", {"timeout_s": patient(20)}) == {"paused": True}
        found = client.call("registers")["values"]
        code = base64.b64decode(
            client.call("memory.read", {"gpa": int(found["rip"], 16), "length": 8})["data"]
        )
        assert code in run.path.with_name("guest.elf").read_bytes()
        client.call("resume")
        assert client.call("stop")["outcome"]["kind"] == "STOPPED"
        assert run.end() == (0, "")
        wait_until(lambda: events[-1]["event"] == "ended")
        assert events[-1]["register_values"][0]["cs"] == "0x10"
        assert not run.path.exists()


@bare
@pytest.mark.parametrize(("code", "kind", "status"), [
    (REPORT_7, "GUEST_STATUS", 7), (TRIPLE_FAULT, "TRIPLE_FAULT", 122), (HALT, "SHUTDOWN", 0),
])
def test_every_end_is_told(tmp_path: Path, code: bytes, kind: str, status: int) -> None:
    ours, theirs = socket.socketpair()
    kernel = write_guest(tmp_path / "guest.elf", prints(b"x"), code)
    with theirs:
        process = subprocess.Popen(
            command("--console", "none", "--control-fd", str(theirs.fileno()), kernel=kernel),
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            env=environment(),
        )
    events: list[dict[str, Any]] = []
    with Client(ours, on_event=events.append) as client:
        client.wait_hello(patient(20))
        client.call("subscribe", {"events": ["ended"]})  # in time even for so short a run
        wait_until(lambda: client.is_closed, 20)
    assert process.wait(patient(20)) == status
    assert (events[-1]["outcome"]["kind"], events[-1]["outcome"]["exit_status"]) == (kind, status)


@bare
def test_the_end_of_the_owner_is_the_end_of_the_machine(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    kernel = write_guest(tmp_path / "guest.elf", SPIN)
    with theirs:
        process = subprocess.Popen(
            command("--console", "none", "--control-fd", str(theirs.fileno()), kernel=kernel),
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[theirs.fileno()],
            env=environment(),
        )
    client = Client(ours)
    client.wait_hello(patient(20))
    client.close()
    assert process.communicate(timeout=patient(20))[1] == b""
    assert process.returncode == 0


def test_the_owner_learns_why_there_is_no_machine(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            command("--control-fd", str(theirs.fileno()), kernel=tmp_path / "missing"),
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[theirs.fileno()],
            env=environment(),
        )
    with Client(ours) as client, pytest.raises(ConfigError, match="missing: cannot open"):
        client.wait_hello(patient(20))
    assert process.communicate(timeout=patient(20))[1].count(b"\n") == 1
    assert process.returncode == 125


def test_an_owner_that_goes_away_during_the_start_ends_it(tmp_path: Path) -> None:
    """A disk's server that says nothing would let the start wait for long."""
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / "silent"))
    silent.listen(8)
    ours, theirs = socket.socketpair()
    with theirs, silent:
        process = subprocess.Popen(
            command("--control-fd", str(theirs.fileno()), "--disk",
                    f"nbd+unix:///?socket={tmp_path}/silent",
                    kernel=write_guest(tmp_path / "guest.elf", SPIN)),
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            env=environment(),
        )
        connection, _ = silent.accept()
        with connection:
            assert process.poll() is None
            ours.close()
            assert process.wait(patient(5)) == -signal.SIGTERM


@pytest.mark.parametrize(("options", "said"), [
    (("--control", "x" * 108), "is not a path of 1 to 107 bytes"),
    (("--control", "guest.elf"), "is there, and is no socket"),
    (("--control", "missing/socket"), "cannot be a socket: No such file or directory"),
    (("--control-fd", "x"), "--control-fd x: is no number of a descriptor"),
    (("--control-fd", "99"), "--control-fd 99: is no socket: Bad file descriptor"),
    (("--control-fd", "0"), "--control-fd 0: is no socket"),
])
def test_a_socket_that_cannot_be_is_one_line(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    kernel = write_guest(tmp_path / "guest.elf", SPIN)
    done = subprocess.run(
        command(*options, kernel=kernel), capture_output=True, check=False, env=environment(),
        stdin=subprocess.DEVNULL, cwd=tmp_path,
    )
    assert done.returncode == 125
    assert said in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["guest.elf"]


@bare
def test_a_socket_in_use_is_refused_and_a_stale_one_replaced(
    spinning: Run, tmp_path: Path
) -> None:
    second = command("--control", str(spinning.path), kernel=tmp_path / "guest.elf")
    done = subprocess.run(second, capture_output=True, check=False, env=environment())
    assert done.returncode == 125
    assert b"is in use: somebody listens on it" in done.stderr
    spinning.process.kill()
    spinning.process.communicate()
    assert spinning.path.exists()
    with Run(tmp_path, SPIN) as run:
        with run.client() as client:
            client.call("stop")
        assert run.end()[0] == 0


@bare
def test_a_flood_loses_a_reader_bytes_and_the_guest_none(tmp_path: Path) -> None:
    with Run(tmp_path, prints_for_ever(b"0123456789abcdef" * 16)) as run:
        raw = socket.socket(socket.AF_UNIX)
        with raw, run.client() as client:
            raw.connect(str(run.path))
            raw.sendall(b'{"id":1,"method":"subscribe","params":{"events":["console"]}}\n')
            before = client.call("status")["console_bytes"]
            wait_until(lambda: client.call("status")["console_bytes"] > before + 100_000, 30)
            resident = Path(f"/proc/{run.process.pid}/statm").read_text().split()[1]
            assert int(resident) * 4096 < 300 << 20
            client.call("stop")
        assert run.end()[0] == 0


@bare
def test_keys_and_signals_work_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "control"
    kernel = write_guest(tmp_path / "guest.elf", prints(b"ready\n"), echoes())
    terminal = Terminal("--control", str(path), kernel=kernel)
    terminal.wait_for("ready")
    events: list[dict[str, Any]] = []
    with Client.connect(str(path), on_event=events.append) as client:
        client.call("subscribe", {"events": ["state"]})
        terminal.type("\x01p")
        terminal.wait_for("paused")
        wait_until(lambda: any(event.get("paused") for event in events))
        terminal.type("\x01p")
        terminal.wait_for("resumed")
        terminal.type("abc")
        client.call("console.write", {"data": base64.b64encode(b"def").decode()})
        terminal.wait_for("abcdef")
        terminal.type("\x01x")
        assert terminal.status() == 0
    assert not path.exists()


@bare
def test_a_signal_ends_it_and_clients_are_told(spinning: Run) -> None:
    with spinning.client() as client:
        waiting = client.begin("wait")
        client.call("status")
        spinning.process.send_signal(signal.SIGTERM)
        assert waiting.result(patient(20))["outcome"]["exit_status"] == 128 + 15
    assert spinning.end()[0] == 128 + 15
    assert not spinning.path.exists()


@bare
def test_ctl_drives_a_real_machine(spinning: Run) -> None:
    def ctl(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "pyvmm", "ctl", str(spinning.path), *words],
            capture_output=True, check=True, env=environment(), text=True,
        ).stdout

    assert "memory   64M, vCPUs: 1" in ctl("status")
    ctl("pause")
    assert ", paused" in ctl("status")
    assert " rip 00000000" in ctl("registers")
    ctl("stop")
    assert spinning.end() == (0, "")


# pyvmm ps


def listed(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "ps", *options], capture_output=True, check=True,
        env=environment(), text=True,
    )
    assert done.stderr == ""
    return done.stdout


@bare
def test_ps_lists_machines_and_asks_them(spinning: Run, tmp_path: Path) -> None:
    with spinning.client() as client:
        client.call("pause")
    found = {each["pid"]: each for each in json.loads(listed("--json"))}
    machine = found[spinning.process.pid]
    assert machine.pop("age") < patient(60)
    assert machine == {
        "pid": spinning.process.pid, "uid": os.getuid(), "memory": 64 << 20,
        "kernel": str(tmp_path / "guest.elf"), "agent": "waiting", "paused": True,
        "socket": str(spinning.path),
    }
    rows = listed().splitlines()
    assert rows[0].split() == ["pid", "age", "memory", "kernel", "agent", "socket"]
    (row,) = [row for row in rows if row.startswith(f"{spinning.process.pid} ")]
    assert row.split()[2:] == ["64M", str(tmp_path / "guest.elf"), "waiting", str(spinning.path)]
    spinning.process.kill()
    spinning.process.communicate()
    assert f"{spinning.process.pid} " not in listed()


@pytest.mark.parametrize(("argv", "found"), [
    (["python3", "-m", "pyvmm", "run", "--kernel", "k"], ["run", "--kernel", "k"]),
    (["python3", "-P", "-m", "pyvmm", "run"], ["run"]),
    (["/venv/bin/python", "/venv/bin/pyvmm", "run", "--kernel=k"], ["run", "--kernel=k"]),
    (["pyvmm", "run", "--kernel", "k"], ["run", "--kernel", "k"]),
    (["pyvmm", "restore", "warm"], ["restore", "warm"]),
    (["pyvmm", "snapshot", "info", "restore"], []),
    (["python3", "-m", "pyvmm", "lab", "--", "pyvmm", "run", "--kernel", "k"], []),
    (["vim", "x", "pyvmm", "run"], []),
    (["grep", "pyvmm", "run", "notes"], []),
    ([], []),
])
def test_a_machine_is_known_by_its_command_line(argv: list[str], found: list[str]) -> None:
    assert ps.machine_words([os.fsencode(word) for word in argv]) == found


def test_clones_are_listed_and_whoever_forks_them_is_not(tmp_path: Path) -> None:
    forks = b"python\0-m\0pyvmm\0restore\0warm\0--clones-fd=5\0"
    for pid, parent, cmdline in (
        (7, 1, b"pyvmm\0restore\0warm\0"), (8, 1, forks), (9, 8, forks), (1, 0, b"init\0"),
    ):
        folder = tmp_path / str(pid)
        (folder / "cwd" / "warm").mkdir(parents=True)
        with (folder / "cwd" / "warm" / "ram").open("wb") as ram:
            ram.truncate(64 << 20)
        (folder / "cmdline").write_bytes(cmdline)
        (folder / "stat").write_text(f"{pid} (a) b) S {parent} " + " ".join(["0"] * 17) + " 100 0")
    found = list(ps.machines(str(tmp_path)))
    assert [machine["pid"] for machine in found] == [7, 9]
    assert {(one["kernel"], one["memory"]) for one in found} == {("clone of warm", 64 << 20)}


def test_processes_that_end_or_lie_meanwhile_are_left_out(tmp_path: Path) -> None:
    for pid, cmdline in (
        ("7", b"python\0-m\0pyvmm\0run\0--kernel\0k\0"), ("8", b""), ("9", b"\xff" * 100),
        ("10", b"pyvmm\0run\0--no-such\0"), ("11", b"pyvmm\0run\0--help\0"),
    ):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(cmdline)
    (tmp_path / "7" / "stat").write_text("7 (a) b) S " + " ".join(["0"] * 18) + " 100 0")
    (tmp_path / "self").mkdir()
    found = list(ps.machines(str(tmp_path)))
    assert [machine["pid"] for machine in found] == [7]
    assert found[0]["agent"] is None


def test_ps_escapes_what_others_name_their_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"pid": 1, "uid": 0, "age": 3700.0, "memory": None, "kernel": "\x1b[2J\n",
               "agent": None, "paused": None, "socket": None}
    monkeypatch.setattr(ps, "machines", lambda: iter([machine]))
    assert ps.ps_main([]) == 0
    assert "1    1:01:40  -       \\x1b[2J\\n" in capsys.readouterr().out


def test_a_client_of_nobody_is_an_error_at_once(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with pytest.raises(ControlError, match="No such file"):
        Client.connect(str(tmp_path / "missing"))
    assert time.monotonic() - began_s < patient(5)
