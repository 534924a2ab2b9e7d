"""Kernels of a few bytes for inner pytest sessions, and what such a session leaves behind."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from tests.support.tiny_guests import REBOOT, REPORT_0, SPIN, TRIPLE_FAULT, prints, write_guest

IDLE = bytes.fromhex("fb f4 ebfd")  # sti; next: hlt; jmp next: with no interrupt to wake it

LINES = {
    "panic": b"[    1.0] Kernel panic - not syncing: no reason",
    "oops": b"[    1.0] BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "warning": b"[    1.0] WARNING: CPU: 0 PID: 1 at fs/x.c:7 f+0x1/0x2",
    "lockup": b"[    1.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [x:1]",
    "root": b"[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs on \"/dev/x\"",
    "colour": b"[    1.0] the sky is green",
}
"""The line that a guest of this name prints before it idles."""


def write_guests(folder: Path) -> None:
    """Write all kernels into ``folder``: ready, spins, triple-fault, reboots, and those of LINES.
    """
    hello = prints(b"[    0.5] ready\r\n")
    write_guest(folder / "ready", hello, IDLE)
    write_guest(folder / "spins", hello, SPIN)
    write_guest(folder / "triple-fault", hello, TRIPLE_FAULT)
    write_guest(folder / "reboots", hello, REBOOT)
    write_guest(folder / "reports", hello, REPORT_0)
    for name, line in LINES.items():
        write_guest(folder / name, hello, prints(line + b"\r\n"), IDLE)


LEFTOVERS = '''
import os
import threading
from pathlib import Path

import pytest

BEFORE = []


def left():
    """Return the descriptors, threads and children of this process."""
    threads = sorted(thread.name for thread in threading.enumerate())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), threads, children


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    before = left()
    result = yield
    if BEFORE and left() != before:  # the first test imports, which opens things
        print(f"LEFT BY {item.nodeid}: {before} -> {left()}", flush=True)
    BEFORE.append(item)
    return result
'''
"""A conftest that tells what a test has left in its process."""


def guests_of(folder: Path) -> list[int]:
    """Return the processes of guests whose kernel lies in ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = process.joinpath("cmdline").read_bytes()
            if b"--kernel=" + os.fsencode(folder) in words:
                found.append(int(process.name))
    return found


def wait_until_gone(folder: Path, seconds: float) -> list[int]:
    """Return the guests of ``folder`` that are left after so many seconds."""
    until_s = time.monotonic() + seconds
    while (left := guests_of(folder)) and time.monotonic() < until_s:
        time.sleep(0.05)
    return left
