"""A control server on a machine that is none: every test of the protocol without KVM."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from pyvmm.api.vcpus import Registers
from pyvmm.control.agent_bridge import Port
from pyvmm.control.client import Client
from pyvmm.control.saves import Saves
from pyvmm.control.server import Server
from pyvmm.errors import GuestMemoryError
from pyvmm.run.outcome import Outcome
from pyvmm.vhost_user.listener import Listener
from tests.support.patience import patient

MEMORY_BYTES = 1 << 20


class StandInTarget:
    """A ``Target``: two vCPUs, 1 MiB of memory, a console that a test writes."""

    def __init__(self, port: Port | None = None) -> None:
        self.facts: dict[str, object] = {
            "pyvmm": "0.0", "kernel": "stand-in", "kernel_release": "1.0",
            "kernel_version": "1.0 (test)",
            "is_linux": True, "started_s": time.clock_gettime(time.CLOCK_BOOTTIME),
            "pid": os.getpid(), "agent_way": "image", "memory_bytes": MEMORY_BYTES, "disks": [],
        }
        self.vcpu_count = 2
        self.agent_port = port
        self.saves: Saves | None = None
        self.sets_clock = False
        self.clone_id: UUID | None = None
        self.typed = b""
        self.refreshed = 0
        self.is_paused = self.is_stuck = False
        self.outcome: Outcome | None = None
        self.finished = threading.Event()
        self.print_out: Callable[[bytes], None] = lambda data: None
        self.woken: Callable[[], None] = lambda: None

    def observe(self, console: Callable[[bytes], None], woken: Callable[[], None]) -> None:
        self.print_out, self.woken = console, woken

    def begin_pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    @property
    def is_at_rest(self) -> bool:
        return self.finished.is_set() or (self.is_paused and not self.is_stuck)

    def finish(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
        self.finished.set()

    def refresh_disks(self) -> None:
        self.refreshed += 1

    def type(self, data: bytes) -> bool:
        if len(self.typed) + len(data) > 1 << 20:
            return False
        self.typed += data
        return True

    def registers(self, vcpu: int) -> Registers:
        if not self.is_at_rest:
            raise RuntimeError("the guest runs")
        values = dict.fromkeys(Registers._fields, 0) | {"rip": (1 << 64) - 1, "rax": vcpu}
        return Registers(**values)

    def memory(self, gpa: int, length: int) -> bytes:
        if gpa + length > MEMORY_BYTES:
            raise GuestMemoryError(gpa, length)
        return bytes((gpa + index) & 0xFF for index in range(length))

    def evidence(self) -> dict[str, object]:
        return {"has_panicked": False, "panic": None}


class Served:
    """A server on ``target`` at ``path``, and clients of it."""

    def __init__(self, target: StandInTarget, server: Server, path: Path) -> None:
        self.target, self.server, self.path = target, server, path
        self.lines: list[str] = []
        self.clients: list[Client] = []

    def client(self, **given: Any) -> Client:
        """Return a connected client, which is closed at the end."""
        client = Client.connect(str(self.path), **given)
        self.clients.append(client)
        return client

    def end(self) -> None:
        """The run ends, as ``pyvmm run`` has it."""
        assert self.target.outcome is not None
        self.server.end(self.target.outcome)


@contextlib.contextmanager
def served(
    folder: Path, port: Port | None = None, *, is_counted: bool = True
) -> Iterator[Served]:
    """A server on a stand-in, whose descriptors are counted: none is left behind."""
    fds_before = open_descriptors()
    target = StandInTarget(port)
    path = folder / "control"
    lines: list[str] = []
    listener = Listener(str(path))
    server = Server(target, listener=listener, report=lines.append)
    found = Served(target, server, path)
    found.lines = lines
    server.start()
    try:
        yield found
    finally:
        for client in found.clients:
            client.close()
        server.close()
        listener.close()
    assert lines == []
    if not is_counted:
        return
    until_s = time.monotonic() + patient(5)
    while open_descriptors() > fds_before and time.monotonic() < until_s:
        time.sleep(0.01)
    assert open_descriptors() <= fds_before


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def wait_until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something that must come."""
    until_s = time.monotonic() + patient(timeout_s)
    while not is_so():
        assert time.monotonic() < until_s, "it did not come"
        time.sleep(0.005)
