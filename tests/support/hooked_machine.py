"""The parts of a machine that hooks are put into, with vCPUs made of Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from pyvmm.board.board import Board
from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.kvm.exits import Direction, ExitReason, RunPage
from pyvmm.run.outcome import Outcome
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import VcpuLoop
from tests.support.runner_rig import FakeVcpu

RAM_BYTES = 1 << 20
PORT, PAGE = 0x70, 0xD000_0000
DATA_OFFSET = 4096


class Remembering:
    """A device that remembers what is written, and answers with its number."""

    def __init__(self, number: int = 0x5A) -> None:
        self.number = number
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return self.number

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


@dataclass
class Machine:
    """The parts of a machine that hooks are put into; its guest makes ``exits``, then halts."""

    board: Board
    runner: Runner
    loops: list[VcpuLoop] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    """The contents of the run page, each time the guest was entered again after an exit."""

    def run(self, *exits: Callable[[RunPage], int]) -> Outcome:
        """Run, and return how it ended."""
        return self.runner.run(
            vcpus=self.prepared(*exits), workers=(), console=Console(None, None),
            output=OutputBuffer(None, self.runner.wake, lambda data: None),
        )

    def prepared(self, *exits: Callable[[RunPage], int]) -> list[VcpuLoop]:
        self._waiting.extend(exits)
        return self.loops

    def add_vcpu(self) -> None:
        self._waiting: list[Callable[[RunPage], int]] = []
        is_first = [True]

        def guest(vcpu: FakeVcpu) -> int:
            if not is_first[0]:
                self.answers.append(vcpu.page.read(DATA_OFFSET, 4) + vcpu.page.union(16)[8:12])
            is_first[0] = False
            return self._waiting.pop(0)(vcpu.page) if self._waiting else int(ExitReason.HLT)

        self.loops.append(VcpuLoop(
            FakeVcpu(guest), pio=self.board.pio, mmio=self.board.mmio, describe=lambda: "",
            finish=self.runner.finish,
        ))


def port_write(port: int, value: int, size: int = 1, count: int = 1) -> Callable[[RunPage], int]:
    return functools.partial(_io, Direction.OUT, port, value, size, count)


def port_read(port: int, size: int = 1, count: int = 1) -> Callable[[RunPage], int]:
    return functools.partial(_io, Direction.IN, port, 0, size, count)


def _io(direction: int, port: int, value: int, size: int, count: int, page: RunPage) -> int:
    head = bytes([direction, size]) + port.to_bytes(2, "little") + count.to_bytes(4, "little")
    for at, one in enumerate((*head, *DATA_OFFSET.to_bytes(8, "little"))):
        page.set_int(32 + at, 1, one)
    for item in range(count):
        page.set_int(DATA_OFFSET + item * size, size, value)
    return int(ExitReason.IO)


def memory_access(
    address: int, size: int = 4, value: int | None = None
) -> Callable[[RunPage], int]:
    def make(page: RunPage) -> int:
        page.set_int(32, 8, address)
        page.set_mmio_data(value or 0)
        page.set_int(48, 4, size)
        page.set_int(52, 1, value is not None)
        return int(ExitReason.MMIO)

    return make
