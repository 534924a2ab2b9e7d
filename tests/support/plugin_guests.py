"""Kernels of a few bytes for inner pytest sessions, and what such a session leaves behind."""

from __future__ import annotations

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
import subprocess
import threading

import pytest


def left():
    """Descriptors, threads and child processes of this process."""
    found = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}")}
    fds = len(os.listdir("/proc/self/fd"))
    children = subprocess.run(
        ["ps", "-o", "cmd=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout.splitlines()
    children = [line for line in children if "pyvmm run" in line]
    threads = sorted(thread.name for thread in threading.enumerate())
    return fds, threads, children


BEFORE = []


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    if not BEFORE:
        BEFORE.append(None)  # the first test imports, which opens things
        return (yield)
    before = left()
    result = yield
    after = left()
    if before != after:
        print(f"LEFT BY {item.nodeid}: {before} -> {after}", flush=True)
    return result
'''
"""A conftest that tells what a test has left in its process."""
