"""Every test here leaves no descriptor, thread or process behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvmm
from tests.support.patience import patient
from tests.support.tiny_guests import SPIN, prints, write_guest


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves something."""
    patient(1)  # measures once, by processes
    gc.collect()
    fds, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/proc/self/fd")) <= fds
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch) -> Iterator[pyvmm.Vm]:
    """A Vm whose guest is the agent's program on this host: commands run here."""
    monkeypatch.setattr("pyvmm.launcher.process.PROGRAM", (
        sys.executable, "-P", "-m", "tests.support.agent_process",
    ))
    with pyvmm.launch(pyvmm.MachineConfig(kernel="k")) as vm:
        vm.wait_for_agent(patient(20))
        yield vm


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A guest that prints a line and spins."""
    return write_guest(tmp_path / "guest.elf", prints(b"hello\n"), SPIN)
