"""A jailed machine and the process beside it, as a user sees them: ends, signals, terminals."""

from __future__ import annotations

import os
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.guest import command, environment
from tests.support.patience import patient
from tests.support.terminal import Terminal
from tests.support.tiny_guests import HALT, REPORT_7, SPIN, prints, write_guest

pytestmark = pytest.mark.bare

JAILED = (
    "pyvmm: the jail ended this machine: a thread made a system call that its filter does not "
    "have; please report this (docs/jail.md)"
)
HELLO = prints(b"hello\n")


class Run:
    """A ``pyvmm run`` of ``code`` in a process group of its own, once the guest has printed."""

    def __init__(self, folder: Path, *code: bytes, options: tuple[str, ...] = ()) -> None:
        kernel = write_guest(folder / "guest.elf", HELLO, *code)
        self.process = subprocess.Popen(
            command("--memory", "64M", *options, kernel=kernel), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=folder,
            process_group=0,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"hello\n"

    @property
    def attendants(self) -> list[int]:
        """The processes beside it."""
        pid = self.process.pid
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return list(map(int, text.split()))

    @property
    def attendant(self) -> int:
        """The only process beside it."""
        (child,) = self.attendants
        return child

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and standard error, which nobody has open."""
        _, messages = self.process.communicate(timeout=patient(60))
        return self.process.returncode, messages.decode()


def until(done: Callable[[], bool]) -> None:
    """Wait for ``done``."""
    until_s = time.monotonic() + patient(20)
    while not done():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def is_there(pid: int) -> bool:
    """True if there is a process ``pid``."""
    return os.path.exists(f"/proc/{pid}")


def test_a_guest_is_explained_by_the_process_beside_its_machine(tmp_path: Path) -> None:
    ends = []
    for jail in "on", "off":
        run = Run(tmp_path, HALT, options=("--jail", jail, "--cmdline", "quiet"))
        status, said = run.end()
        ends.append((status, [line for line in said.splitlines() if "--jail off" not in line]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_ends_both_in_order(tmp_path: Path, number: int) -> None:
    run = Run(tmp_path, SPIN, options=("--control", "socket"))
    beside = run.attendant
    os.killpg(run.process.pid, number)
    status, said = run.end()
    assert (status, JAILED in said) == (128 + number, False)
    assert not is_there(beside)
    assert os.listdir(tmp_path) == ["guest.elf"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSYS])
def test_a_killed_machine_leaves_no_socket_and_no_process(tmp_path: Path, number: int) -> None:
    run = Run(tmp_path, SPIN, options=("--control", "socket"))
    beside = run.attendant
    assert os.path.exists(tmp_path / "socket")
    os.killpg(run.process.pid, number)
    assert run.end() == (-number, f"{JAILED}\n" if number == signal.SIGSYS else "")
    until(lambda: not is_there(beside))
    assert os.listdir(tmp_path) == ["guest.elf"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSYS])
def test_a_machine_of_another_user_leaves_no_socket_of_roots(tmp_path: Path, number: int) -> None:
    run = Run(tmp_path, SPIN, options=("--control", "socket", "--user", "54321:54321"))
    beside = run.attendants
    assert os.path.exists(tmp_path / "socket")
    os.killpg(run.process.pid, number)
    _, said = run.end()
    assert said.splitlines().count(JAILED) == (number == signal.SIGSYS)
    until(lambda: not any(map(is_there, beside)))
    assert os.listdir(tmp_path) == ["guest.elf"]


def test_a_machine_whose_attendant_was_killed_runs_on_to_its_end(tmp_path: Path) -> None:
    run = Run(tmp_path, SPIN, options=("--timeout", "2"))
    os.kill(run.attendant, signal.SIGKILL)
    status, said = run.end()
    assert (status, said.startswith("pyvmm: timeout")) == (124, True)


def test_no_attendant_without_a_jail(tmp_path: Path) -> None:
    run = Run(tmp_path, SPIN, options=("--jail", "off"))
    pid = run.process.pid
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
    run.process.terminate()
    assert run.end()[0] == 128 + signal.SIGTERM


def test_runs_leave_nobody_behind(tmp_path: Path) -> None:
    beside = []
    for _ in range(3):
        run = Run(tmp_path, prints(b"x" * 2000), REPORT_7)
        beside += [run.process.pid]
        assert run.end() == (7, "")
    for pid in beside:
        assert not is_there(pid)


def test_a_terminal_gets_its_modes_back_from_a_machine_that_was_killed(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest.elf", HELLO, SPIN)
    words = command("--memory", "64M", kernel=kernel)
    # The shell ends with its machine's status, and does not touch the terminal.
    shell = ("/bin/sh", "-c", '"$@"; sleep 60', "sh", *words)
    terminal = Terminal(words=shell)
    try:
        before = termios.tcgetattr(terminal.master)
        terminal.wait_for("hello")
        until(lambda: termios.tcgetattr(terminal.master) != before)
        pid = terminal.pid
        (machine,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        os.kill(machine, signal.SIGSYS)
        terminal.wait_for("the jail ended this machine")
        until(lambda: termios.tcgetattr(terminal.master) == before)
    finally:
        os.killpg(terminal.pid, signal.SIGKILL)
        terminal.close()
