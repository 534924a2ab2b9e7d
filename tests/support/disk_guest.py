"""Machines under guest/bare/drive_disk.S, to be saved half-way: any /dev/kvm will do."""

from __future__ import annotations

import time
from pathlib import Path

from pyvmm.config import DiskConfig, RunConfig
from pyvmm.machine import Machine, build
from pyvmm.report import Reporter
from pyvmm.storage.open import DiskSource
from pyvmm.virtio.device import VirtioDevice
from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient

COUNTER = 0x180000
SECTORS = 64
MEMORY_BYTES = 16 << 20
WAIT_S = 30.0


def disk_machine(
    folder: Path, *, rounds: int, packed: bool = False, cpus: int = 1, mmio: str = "mapped"
) -> RunConfig:
    """The configuration of a machine whose guest does ``rounds`` rounds on its disk."""
    code = assemble("drive_disk", LONG_MODE_ENTRY, folder)[:-12] + b"".join(
        value.to_bytes(4, "little") for value in (rounds, packed, cpus > 1)
    )
    kernel, disk = folder / "drive_disk.elf", folder / "disk.img"
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=len(code))))
    disk.write_bytes(bytes(SECTORS * 512))
    return RunConfig(
        kernel=kernel, disks=(DiskConfig(source=DiskSource(location=str(disk))),),
        append="console=hvc0 console=ttyS0", memory_bytes=MEMORY_BYTES, cpus=cpus, mmio=mmio,
        console=str(folder / "console"), timeout_s=patient(2 * WAIT_S),
    )


def expected_disk(rounds: int) -> bytes:
    """Return the content of the disk after ``rounds`` rounds."""
    sectors = [0] * SECTORS
    for number in range(rounds):
        sectors[number % SECTORS] = number + 1
    return b"".join(value.to_bytes(4, "little") * 128 for value in sectors)


def rounds_done(machine: Machine) -> int:
    """How many rounds the guest has done."""
    return machine.board.memory.read_int(COUNTER, 4)


def wait_for_rounds(machine: Machine, count: int) -> None:
    """Wait until the guest has done ``count`` rounds; AssertionError if the run ends before."""
    until_s = time.monotonic() + patient(WAIT_S)
    while rounds_done(machine) < count:
        assert time.monotonic() < until_s, f"{rounds_done(machine)} rounds"
        assert machine.wait(0.001) is None


def read_memory(machine: Machine) -> list[bytes]:
    """A copy of all RAM, region by region."""
    return [bytes(region.view) for region in machine.board.memory.regions]


def write_memory(machine: Machine, content: list[bytes]) -> None:
    """Give ``machine`` the RAM that ``read_memory`` returned."""
    for region, data in zip(machine.board.memory.regions, content, strict=True):
        region.view[:] = data


def built(config: RunConfig, **devices: VirtioDevice) -> Machine:
    """A machine of ``config``, not started; ``devices`` are in its last slots."""
    return build(config, report=Reporter(), devices=devices)
