"""A session with a machine played by the test: what was prepared in its sockets, it "said"."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from pyvmm.errors import HostError
from pyvmm.lab import session as session_module
from pyvmm.lab.session import Session, Wiring

MARK = b"\0mark"


class Machine:
    """The machine's ends.  ``kill`` closes them, as QEMU's death does."""

    def __init__(self) -> None:
        pairs = {name: socket.socketpair() for name in ("in", "out", "err", "control")}
        self.ports = {name: theirs for name, (_, theirs) in pairs.items()}
        self.ours = {name: ours for name, (ours, _) in pairs.items()}
        for sock in self.ours.values():
            sock.setblocking(False)
        self.console_fd, self.console = os.pipe()
        self.messages_fd, self.messages = os.pipe()
        self.killed = False
        self.said: list[str] = []
        self.told = b""

    def session(
        self, *, timeout_s: float | None = None, stdin_fd: int | None = None
    ) -> Session:
        wiring = Wiring(
            ports=self.ours, console_fd=self.console_fd, messages_fd=self.messages_fd
        )
        return Session(
            wiring, end_mark=MARK, kill=self.kill, say=self.said.append, timeout_s=timeout_s,
            stdin_fd=stdin_fd,
        )  # fmt: skip

    def control(self, *lines: str) -> None:
        self.ports["control"].sendall("".join(line + "\n" for line in lines).encode())

    def output(self, out: bytes, err: bytes = b"") -> None:
        self.ports["out"].sendall(out + MARK)
        self.ports["err"].sendall(err + MARK)

    def kill(self) -> None:
        if not self.killed:
            self.killed = True
            self.ports["control"].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                self.told = self.ports["control"].recv(1000)
            for sock in self.ports.values():
                sock.close()
            os.close(self.console)
            os.close(self.messages)

    def close(self) -> None:
        self.kill()
        for sock in self.ours.values():
            sock.close()
        os.close(self.console_fd)
        os.close(self.messages_fd)


@pytest.fixture
def machine() -> Iterator[Machine]:
    it = Machine()
    yield it
    it.close()


def send_later(number: int, delay_s: float) -> threading.Timer:
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), number))
    timer.start()
    return timer


def test_status_and_both_streams(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    machine.control("ready", "exit 7")
    machine.output(b"out", b"err")
    assert machine.session().run() == 7
    assert capfd.readouterr() == ("out", "err")
    assert machine.ports["control"].recv(100) == b"hello\n"
    assert machine.said == []


def test_output_behind_the_status_is_waited_for(
    machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    machine.control("ready", "exit 0")
    late = threading.Timer(0.2, machine.output, (b"late",))
    late.start()
    assert machine.session().run() == 0
    late.join()
    assert capfd.readouterr().out == "late"


def test_standard_input_reaches_the_machine(machine: Machine) -> None:
    machine.control("ready", "exit 0")
    late = threading.Timer(0.2, machine.output, (b"",))
    late.start()
    read_end, write_end = os.pipe()
    os.write(write_end, b"typed")
    os.close(write_end)
    assert machine.session(stdin_fd=read_end).run() == 0
    late.join()
    os.close(read_end)
    assert machine.ports["in"].recv(100) == b"typed"
    assert machine.ports["in"].recv(100) == b""


def test_no_standard_input_is_an_empty_one(machine: Machine) -> None:
    machine.control("ready", "exit 0")
    machine.output(b"")
    assert machine.session(stdin_fd=None).run() == 0
    machine.ports["in"].setblocking(False)
    assert machine.ports["in"].recv(100) == b""


def test_a_reported_failure_is_the_error(machine: Machine) -> None:
    machine.control("fail cannot mount /x")
    with pytest.raises(HostError, match="lab: cannot mount /x"):
        machine.session().run()
    assert machine.killed


def test_a_machine_that_dies_is_explained_by_its_last_words(machine: Machine) -> None:
    os.write(machine.console, b"Kernel panic - not syncing\r\n")
    os.write(machine.messages, b"qemu: cannot allocate memory\n")
    machine.kill()
    with pytest.raises(HostError, match="ended without a status"):
        machine.session().run()
    assert machine.said == ["| Kernel panic - not syncing", "| qemu: cannot allocate memory"]


def test_a_machine_that_never_starts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "BOOT_LIMIT_S", 0.05)
    with pytest.raises(HostError, match=r"did not start within 0\.05 s"):
        machine.session().run()
    assert machine.killed


def test_timeout_asks_insists_and_pulls_the_plug(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "GRACE_S", 0.05)
    machine.control("ready")
    assert machine.session(timeout_s=0.05).run() == 124
    assert machine.told == b"hello\nsignal TERM\nsignal KILL\n"
    assert machine.said == ["timeout after 0.05 s"]


def test_timeout_is_the_status_although_cmd_ended_in_order(
    machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    machine.control("ready")

    def obey() -> None:
        assert machine.ports["control"].recv(6) == b"hello\n"
        assert machine.ports["control"].recv(100) == b"signal TERM\n"
        machine.output(b"bye")
        machine.control("exit 0")

    guest = threading.Thread(target=obey)
    guest.start()
    assert machine.session(timeout_s=0.05).run() == 124
    guest.join()
    assert capfd.readouterr().out == "bye"


def test_first_interrupt_is_passed_on(machine: Machine) -> None:
    machine.control("ready")

    def obey() -> None:
        assert machine.ports["control"].recv(6) == b"hello\n"
        assert machine.ports["control"].recv(100) == b"signal INT\n"
        machine.output(b"")
        machine.control("exit 5")

    guest = threading.Thread(target=obey)
    guest.start()
    timer = send_later(signal.SIGINT, 0.3)
    assert machine.session().run() == 5
    timer.join()
    guest.join()
    assert not machine.killed


def test_second_interrupt_kills(machine: Machine) -> None:
    machine.control("ready")
    timers = [send_later(signal.SIGINT, 0.3), send_later(signal.SIGINT, 0.6)]
    assert machine.session().run() == 130
    for timer in timers:
        timer.join()
    assert machine.killed


def test_interrupt_before_cmd_runs_kills(machine: Machine) -> None:
    timer = send_later(signal.SIGINT, 0.2)
    assert machine.session().run() == 130
    timer.join()
    assert machine.killed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_kill_and_handlers_come_back(machine: Machine, number: int) -> None:
    machine.control("ready")
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    timer = send_later(number, 0.2)
    assert machine.session().run() == 128 + number
    timer.join()
    assert machine.killed
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_slow_but_steady_end_is_not_cut(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session_module, "LAST_OUTPUT_S", 0.5)
    machine.control("ready", "exit 0")

    def trickle() -> None:
        for _ in range(6):
            machine.ports["out"].sendall(b".")
            threading.Event().wait(0.2)
        machine.output(b"")

    guest = threading.Thread(target=trickle)
    guest.start()
    assert machine.session().run() == 0
    guest.join()
    assert capfd.readouterr().out == "......"


def test_an_end_that_never_comes_is_given_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "LAST_OUTPUT_S", 0.05)
    machine.control("ready", "exit 3")
    assert machine.session().run() == 3
    assert machine.killed
