"""A machine's process that ended without a word: the signal that did it, and its terminal."""

from __future__ import annotations

import os
import pty
import signal
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.attendant.death import ending_signal, restore_terminal
from pyvmm.attendant.start import _modes
from pyvmm.console.terminal import raw_modes

NONE = 1 << 20
"""No descriptor has this number."""


def stat_of(code: int) -> bytes:
    """A /proc/PID/stat whose field 52 is ``code``."""
    return b"17 (a b) c) Z " + b"0 " * 48 + b"%d\n" % code


@pytest.mark.parametrize(("code", "number"), [
    (0, 0), (signal.SIGSYS, 31), (signal.SIGSYS | 0x80, 31), (signal.SIGKILL, 9), (31 << 8, 0),
])
def test_the_state_of_a_dead_process_has_its_signal(code: int, number: int) -> None:
    assert ending_signal(stat_of(code), NONE, NONE) == number


@pytest.mark.parametrize("text", [b"", b"17 (a", b"17 (a) Z 1 2 3", stat_of(0)[:-2] + b"x\n"])
def test_a_state_that_does_not_tell_is_none(text: bytes) -> None:
    assert ending_signal(text, NONE, NONE) == 0


@pytest.mark.parametrize("is_reaped", [False, True])
def test_a_process_tells_after_its_end(is_reaped: bool) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writer)
        os.read(reader, 1)
        os.kill(os.getpid(), signal.SIGSYS)
        os._exit(0)
    state_fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    pidfd = os.pidfd_open(pid)
    assert ending_signal(os.read(state_fd, 4096), state_fd, pidfd) == 0
    os.close(writer)
    os.waitid(os.P_PID, pid, os.WEXITED | (0 if is_reaped else os.WNOWAIT))
    tells = not is_reaped or kernel() >= (6, 15)
    assert ending_signal(b"", state_fd, pidfd) == (signal.SIGSYS if tells else 0)
    if not is_reaped:
        os.waitpid(pid, 0)
    for fd in (reader, state_fd, pidfd):
        os.close(fd)


def kernel() -> tuple[int, int]:
    """This host's version of Linux."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor.partition("-")[0])


# Terminals ---------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[int]:
    ours, theirs = pty.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


def text_of(fd: int) -> str:
    """The modes of ``fd`` as a start tells them."""
    *flags, characters = termios.tcgetattr(fd)
    return " ".join(map(str, (*flags, *(one[0] for one in characters))))


def test_modes_that_are_the_guests_are_taken_back(terminal: int) -> None:
    before, text = termios.tcgetattr(terminal), text_of(terminal)
    termios.tcsetattr(terminal, termios.TCSANOW, raw_modes(before))
    assert termios.tcgetattr(terminal) != before
    restore_terminal(terminal, text)
    assert termios.tcgetattr(terminal) == before


def test_modes_that_a_shell_has_set_since_are_left_alone(terminal: int) -> None:
    text, modes = text_of(terminal), termios.tcgetattr(terminal)
    modes[3] &= ~(termios.ICANON | termios.ECHO)  # as readline does
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
    shown = termios.tcgetattr(terminal)
    restore_terminal(terminal, text)
    assert termios.tcgetattr(terminal) == shown


def test_only_a_terminal_in_front_has_modes_to_tell(terminal: int, tmp_path: Path) -> None:
    assert _modes(terminal) == ""
    with (tmp_path / "file").open("w") as file:
        assert _modes(file.fileno()) == ""


def test_a_terminal_that_hung_up_is_no_error(terminal: int) -> None:
    text = text_of(terminal)
    restore_terminal(NONE, text)
