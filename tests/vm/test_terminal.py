"""A person at the console: a shell on ttyS0 through a pseudo-terminal, signals, Ctrl-A x."""

from __future__ import annotations

import os
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guest import IMAGE, USER_SPACE, command, environment, run_in_guest
from tests.support.patience import patient
from tests.support.terminal import Terminal

pytestmark = pytest.mark.kvm


@pytest.fixture
def shell(image: Path) -> Iterator[Terminal]:
    terminal = Terminal("--disk", str(image), "--append", "quiet pyvmm.shell")
    terminal.wait_for("# ")
    yield terminal
    terminal.close()


def test_a_shell_is_usable(shell: Terminal) -> None:
    shell.type("echo $((6 * 7))\r")
    shell.wait_for("42")
    shell.wait_for("# ")
    shell.type("echo go; cat > /root/pasted\r")
    shell.wait_for("\ngo\r")  # by now the shell has left the terminal to the command
    lines = [f"line {number} of a paste {'x' * 50}" for number in range(200)]
    for line in lines:
        shell.type(line + "\r")
        shell.wait_for(line)
    shell.type("\x04")
    shell.wait_for("# ")
    shell.type("wc -l < /root/pasted\r")
    shell.wait_for("200")


def test_ctrl_c_is_the_guests(shell: Terminal) -> None:
    shell.type("sleep 1000\r")
    time.sleep(0.5)
    shell.type("\x03")
    shell.wait_for("# ")
    shell.type("exit 9\r")
    assert shell.status() == 9


def test_ctrl_a_x_quits_and_restores_the_terminal(shell: Terminal) -> None:
    assert not termios.tcgetattr(shell.master)[3] & termios.ICANON
    shell.type("\x01x")
    assert shell.status() == 0
    assert termios.tcgetattr(shell.master)[3] & (termios.ICANON | termios.ECHO)


def test_ctrl_a_p_pauses_the_guest_and_what_is_typed_waits(shell: Terminal) -> None:
    shell.type("\x01p")
    shell.wait_for("paused; Ctrl-A p resumes")
    shell.type("echo $((6 * 7))\r")
    assert shell.hear(1.0).strip() == b""
    shell.type("\x01p")
    shell.wait_for("resumed")
    shell.wait_for("42")


def test_a_signal_restores_the_terminal(shell: Terminal) -> None:
    os.kill(shell.pid, signal.SIGTERM)
    assert shell.status() == 128 + signal.SIGTERM
    assert termios.tcgetattr(shell.master)[3] & (termios.ICANON | termios.ECHO)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run(number: signal.Signals) -> None:
    with subprocess.Popen(
        command("--disk", f"{IMAGE},ro", "--append", run_in_guest("sleep 1000")),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment(),
    ) as run:
        assert run.stdout is not None
        while USER_SPACE.encode() not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(number)
        run.stdout.read()
        assert run.wait(patient(30)) == 128 + number


def test_a_reader_that_leaves_ends_the_run() -> None:
    with subprocess.Popen(
        command("--disk", f"{IMAGE},ro", "--append", run_in_guest("yes")),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment(),
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.wait(patient(60)) == 128 + signal.SIGPIPE
