"""The configuration of small machines that can be saved, and a guest that counts in its RAM."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyvmm
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient

COUNT = bytes.fromhex("ff042500003000 ebf7")  # again: inc dword [0x300000]; jmp again
COUNTER = 0x300000

Make = Callable[..., pyvmm.MachineConfig]


def config_maker(tmp_path: Path) -> Make:
    """A fixture: makes the configuration of a machine that runs some code and has a disk that can
    be saved."""
    kernel, disk = tmp_path / "guest.elf", tmp_path / "disk.img"
    disk.write_bytes(b"disk".ljust(1 << 20, b"\0"))

    def make(code: bytes, **more: Any) -> pyvmm.MachineConfig:
        kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=4096)))
        return pyvmm.MachineConfig(**{
            "kernel": kernel, "timeout_s": patient(60), "disks": [pyvmm.Overlay(disk)],
            "memory": "16M", **more,
        })

    return make


def count_of(machine: pyvmm.Machine) -> int:
    """The guest's count so far."""
    return int.from_bytes(machine.memory.read(COUNTER, 4), "little")


def wait_for_more(machine: pyvmm.Machine, before: int) -> None:
    """Wait until the guest has counted on."""
    until_s = time.monotonic() + patient(20)
    while count_of(machine) == before:
        assert time.monotonic() < until_s
        time.sleep(0.001)
