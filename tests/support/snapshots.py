"""Machines under drive_disk.S whose disk can be saved, and what clones of them must show."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyvmm.config import RunConfig
from pyvmm.machine import Machine
from pyvmm.report import Reporter
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.snapshot import Snapshot
from pyvmm.storage.open import DiskSource
from tests.support.disk_guest import (
    SECTORS,
    WAIT_S,
    disk_machine,
    expected_disk,
    read_memory,
    wait_for_rounds,
)
from tests.support.kvm_states import comparable_chips, comparable_vcpu
from tests.support.patience import patient

STOPPED = Outcome(Kind.STOPPED)
DONE = Outcome(Kind.GUEST_STATUS, 0)
_OURS = ("memfd:", "kvm-vcpu", "/ram", "pyvmm")


def snapshot_machine(
    folder: Path, *, rounds: int, packed: bool = False, cpus: int = 1, mmio: str = "mapped",
    serve: str = "thread",
) -> RunConfig:
    """The configuration of such a machine: what its guest writes goes to a private overlay."""
    config = disk_machine(folder, rounds=rounds, packed=packed, cpus=cpus, mmio=mmio)
    source = DiskSource(location=str(folder / "disk.img"), snapshot=True)
    return config.replace(
        disks=(config.disks[0].replace(source=source),), serve=serve, console="none",
    )


def read_disk(machine: Machine) -> bytes:
    """The content of the machine's first disk, as the guest would read it."""
    data = bytearray(SECTORS * 512)
    backend = machine.board.slots[0].device._backend  # type: ignore[attr-defined]
    backend.readv([memoryview(data)], 0)
    return bytes(data)


@contextlib.contextmanager
def ending(machine: Machine) -> Iterator[Machine]:
    """Stop and close ``machine`` at the end, whether or not it runs."""
    try:
        yield machine
    finally:
        machine.stop(STOPPED)
        machine.close()


def finish(machine: Machine, rounds: int) -> None:
    """Start ``machine``, let its guest do all ``rounds``, and check its disk."""
    machine.start()
    wait_for_rounds(machine, rounds)
    assert machine.consoles.receive(b"!") == 1
    assert machine.wait(patient(WAIT_S)) == DONE
    assert read_disk(machine) == expected_disk(rounds)


class Resources(NamedTuple):
    """Countable things of this process that a machine must not leave behind."""

    descriptors: tuple[str, ...]
    threads: int
    mappings: int
    children: int

    @classmethod
    def now(cls) -> Resources:
        """Count."""
        gc.collect()
        own = [
            os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        ]
        maps = Path("/proc/self/maps").read_text().splitlines()
        named = [line for line in maps if any(word in line for word in _OURS)]
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return cls(tuple(sorted(own)), threading.active_count(), len(named), len(children))

    def without_image(self) -> tuple[int, int, int]:
        """The same of a machine that now goes on over an image of its RAM, but for that image."""
        return len([name for name in self.descriptors if "memfd" not in name]), self.threads, 0


def comparable_machine(state: dict[str, object]) -> dict[str, object]:
    """``state`` of a machine without what goes on, and what is fresh in each clone."""
    vcpus, chips, board = state["vcpus"], state["chips"], state["board"]
    assert isinstance(vcpus, dict)
    assert isinstance(chips, dict)
    assert isinstance(board, dict)
    parts = {name: part for name, part in board["parts"].items() if name != "VM generation ID"}
    return {
        name: value for name, value in state.items()
        if name not in ("realtime_ns", "clock_ns", "tsc")
    } | {
        "vcpus": {name: comparable_vcpu(one) for name, one in vcpus.items()},
        "chips": comparable_chips(chips),
        "board": board | {"parts": parts},
    }


def clone_of(snapshot: Snapshot) -> Machine:
    """A clone of ``snapshot``."""
    return snapshot.clone(report=Reporter())


def at_rounds(machine: Machine, count: int) -> Machine:
    """``machine``, started, once its guest has gone through ``count`` rounds."""
    machine.start()
    wait_for_rounds(machine, count)
    return machine


def stop_and_save(machine: Machine) -> tuple[dict[str, object], list[bytes]]:
    """Quiesce ``machine``, save it with its RAM, and end it."""
    assert machine.quiesce(patient(WAIT_S))
    state, memory = machine.save(), read_memory(machine)
    assert machine.stop(STOPPED) == STOPPED
    return state, memory
