"""Nothing is imported or opened while a guest runs, whichever way it ends, wherever it prints."""

from __future__ import annotations

import fcntl
import functools
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.devices.power import SLEEP_ENABLE, SLEEP_TYPE_SHIFT
from pyvmm.devices.pvpanic import Event
from pyvmm.x86 import layout
from tests.support.patience import patient
from tests.support.tiny_guests import (
    HALT,
    REBOOT,
    REPORT_7,
    SPIN,
    TRIPLE_FAULT,
    out,
    prints,
    write_guest,
)

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[2]
STRICT_RUN = ROOT / "tests" / "support" / "strict_run.py"
HELLO = prints(b"hello\n")


POWER_OFF = out(
    layout.SLEEP_CONTROL_PORT, layout.S5_SLEEP_TYPE << SLEEP_TYPE_SHIFT | SLEEP_ENABLE
) + SPIN
PANIC = out(layout.PVPANIC_PORT, Event.PANICKED) + SPIN
REPORTS_A_LINE = out(layout.PVPANIC_PORT, Event.CRASH_LOADED)
INTO_NOTHING = b"\xb8\x00\x00\x00\xc0\xff\xe0"  # mov eax, 0xc0000000; jmp rax: there is no RAM
PRINTED_PANIC = prints(b"Kernel panic - not syncing: bad\n") + REBOOT
GAVE_UP = prints(b"\n\nDecoding failed\n\n -- System halted") + HALT


class StrictRun:
    """One ``strict_run.py``, which prints to ``fd``, or to pipes if that is -1.

    ``terminal`` is its controlling terminal, and its input.
    """

    def __init__(self, folder: Path, *code: bytes, options: tuple[str, ...] = (), fd: int = -1,
                 terminal: int = -1) -> None:
        self._report = folder / "report"
        kernel = write_guest(folder / "guest", *code)
        self._process = subprocess.Popen(
            [sys.executable, "-I", STRICT_RUN, ROOT, self._report, *options, "--kernel", kernel,
             *(() if "--timeout" in options else ("--timeout", str(patient(30))))],
            stdin=subprocess.DEVNULL if terminal < 0 else terminal,
            stdout=subprocess.PIPE if fd < 0 else fd, stderr=subprocess.PIPE if fd < 0 else fd,
            start_new_session=True,
            preexec_fn=None if terminal < 0
            else functools.partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def kill(self, number: int) -> None:
        self._process.send_signal(number)

    def finish(self) -> tuple[int, list[str]]:
        """Exit status, and what it did while the guest ran."""
        _, messages = self._process.communicate(timeout=patient(90))
        *lines, last = self._report.read_text().splitlines()
        assert last == f"status {self._process.returncode}", messages
        return self._process.returncode, lines


@pytest.mark.parametrize(("code", "status"), [
    ((TRIPLE_FAULT,), 122), ((HALT,), 121), ((HELLO, HALT), 0), ((GAVE_UP,), 121),
    ((REPORT_7,), 7), ((REBOOT,), 0), ((POWER_OFF,), 0), ((INTO_NOTHING,), 123), ((PANIC,), 121),
    ((PRINTED_PANIC,), 121), ((HELLO, REPORTS_A_LINE, REPORT_7), 7),
], ids=[
    "triple fault", "halt", "halt after words", "gave up", "status", "reset", "power-off",
    "KVM error", "pvpanic", "panic", "line of ours",
])
@pytest.mark.parametrize("cpus", ["1", "2"])
def test_fault_40_no_end_of_a_guest_imports_or_opens_anything(
    tmp_path: Path, code: tuple[bytes, ...], status: int, cpus: str
) -> None:
    assert StrictRun(tmp_path, *code, options=("--cpus", cpus)).finish() == (status, [])


def test_fault_40_nor_does_a_timeout(tmp_path: Path) -> None:
    run = StrictRun(tmp_path, HELLO, SPIN, options=("--timeout", "1"))
    assert run.finish() == (124, [])


def wait_for(read: Callable[[], bytes], text: bytes) -> None:
    """Read until ``text`` has come."""
    got = b""
    while text not in got:
        got += read()


def test_fault_40_nor_does_a_signal(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    run = StrictRun(tmp_path, HELLO, SPIN, fd=write_end)
    os.close(write_end)
    wait_for(lambda: os.read(read_end, 100), b"hello")
    run.kill(signal.SIGTERM)
    assert run.finish() == (128 + signal.SIGTERM, [])
    os.close(read_end)


@pytest.mark.parametrize("where", ["file", "pipe", "socket", "option", "null"])
def test_fault_40_nor_does_a_console(tmp_path: Path, where: str) -> None:
    code = (prints(b"hello\n" * 3000), REPORTS_A_LINE, REPORT_7)
    path = tmp_path / "console"
    fds: list[int] = []
    if where == "option":
        assert StrictRun(tmp_path, *code, options=("--console", str(path))).finish() == (7, [])
        assert path.read_bytes() == b"hello\n" * 3000
        return
    if where == "pipe":
        fds += os.pipe()
    elif where == "socket":
        fds += (one.detach() for one in socket.socketpair())
    else:
        kept = path if where == "file" else Path(os.devnull)
        fds += (os.open(os.devnull, os.O_RDONLY), os.open(kept, os.O_WRONLY | os.O_CREAT, 0o600))
    taken = bytearray()

    def take() -> None:
        while data := os.read(fds[0], 1 << 16):
            taken.extend(data)

    reader = threading.Thread(target=take)
    reader.start()
    run = StrictRun(tmp_path, *code, fd=fds[1])
    os.close(fds[1])
    assert run.finish() == (7, [])
    reader.join()
    os.close(fds[0])
    said = path.read_bytes() if where == "file" else bytes(taken)
    if where != "null":
        ours = b"pyvmm: the guest has panicked; its crash kernel takes over\n"
        assert said.count(ours) == 1
        assert said.replace(ours, b"") == b"hello\n" * 3000


@pytest.mark.parametrize("is_shown_by_another", [False, True])
def test_fault_40_nor_does_a_terminal(tmp_path: Path, is_shown_by_another: bool) -> None:
    """One that the guest asks a question, and that a person leaves by Ctrl-A x.

    Another process may show there what comes through a pipe.
    """
    ours, theirs = pty.openpty()
    read_end, write_end = os.pipe() if is_shown_by_another else (ours, theirs)
    run = StrictRun(tmp_path, prints(b"hello\x1b[6n\x1b[?1000h\n"), REPORTS_A_LINE, SPIN,
                    fd=write_end, terminal=theirs)
    for fd in {write_end, theirs}:
        os.close(fd)
    wait_for(lambda: os.read(read_end, 100), b"takes over")
    os.write(ours, b"\x01x")
    readers = [threading.Thread(target=wait_for_end, args=(fd,)) for fd in {read_end, ours}]
    for reader in readers:
        reader.start()
    assert run.finish() == (0, [])
    for reader in readers:
        reader.join()
    for fd in {read_end, ours}:
        os.close(fd)


def wait_for_end(fd: int) -> None:
    """Read until the terminal hangs up."""
    try:
        while os.read(fd, 1 << 16):
            pass
    except OSError:
        pass


@pytest.mark.parametrize(("code", "status"), [
    ((HALT,), 121), ((HELLO, HALT), 0), ((REPORTS_A_LINE, HELLO, HALT), 0),
])
def test_fault_40_a_halt_needs_no_descriptor(
    tmp_path: Path, code: tuple[bytes, ...], status: int
) -> None:
    assert StrictRun(tmp_path, *code, options=("--no-files",)).finish() == (status, [])
