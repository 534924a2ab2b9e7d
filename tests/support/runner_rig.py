"""A runner with vCPUs made of Python, and pipes in place of a console."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pyvmm.board.bus import Bus
from pyvmm.cli.session import run_session
from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.kvm import abi
from pyvmm.kvm.exits import EXIT_REASON_WORD, RunPage
from pyvmm.kvm.handles import Vcpu
from pyvmm.report import Reporter
from pyvmm.run.io_loop import IoSource
from pyvmm.run.outcome import Outcome
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import VcpuLoop

PAGE_BYTES = 8192


class FakeVcpu(Vcpu):
    """A vCPU whose guest is a function: it returns the next exit reason, or waits for a kick."""

    def __init__(self, guest: Callable[[FakeVcpu], int]) -> None:
        self.page = RunPage(bytearray(PAGE_BYTES))
        self.guest = guest
        self.kicked = threading.Event()
        self.mp_state = abi.KVM_MP_STATE_RUNNABLE
        self.rflags = 0x202
        self.pit_sends_nmi = False
        self.pauses_noted = 0
        self.enter = self._enter

    def _enter(self) -> None:
        if self.kicked.is_set():
            raise InterruptedError
        self.page.words[EXIT_REASON_WORD] = self.guest(self)

    def halt(self) -> int:
        """HLT: until somebody kicks."""
        self.kicked.wait()
        raise InterruptedError

    def request_exit(self) -> None:
        self.kicked.set()

    def clear_exit_request(self) -> None:
        self.kicked.clear()

    def note_pause(self) -> None:
        self.pauses_noted += 1

    def get_mp_state(self) -> int:
        return self.mp_state

    def pit_can_wake(self) -> bool:
        return self.pit_sends_nmi

    def get_regs(self) -> abi.kvm_regs:
        return abi.kvm_regs(rflags=self.rflags)


@dataclass
class Rig:
    """A runner, its buses and pipes for the console."""

    runner: Runner = field(default_factory=lambda: Runner(Reporter(io.StringIO())))
    pio: Bus = field(default_factory=lambda: Bus("PIO", 0))
    mmio: Bus = field(default_factory=lambda: Bus("MMIO", 12))
    received: bytearray = field(default_factory=bytearray)
    observed: bytearray = field(default_factory=bytearray)
    refresh: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.input_read, self.input_write = os.pipe()
        self.output_read, self.output_write = os.pipe()
        self.output = OutputBuffer(self.output_write, self.runner.wake, self.observed.extend)

    def receive(self, data: bytes) -> int:
        self.received += data
        return len(data)

    def run(
        self,
        guest: Callable[[FakeVcpu], int],
        workers: list[tuple[str, list[IoSource]]] | None = None,
        at_end: Sequence[Callable[[], None]] = (),
    ) -> Outcome:
        self.vcpu = FakeVcpu(guest)
        loop = VcpuLoop(
            self.vcpu, pio=self.pio, mmio=self.mmio, describe=lambda: "rip 0x1234",
            finish=self.runner.finish,
        )
        console = Console(self.input_read, None)

        def run() -> Outcome:
            return self.runner.run(
                vcpus=[loop], workers=workers or [], console=console, output=self.output,
                at_end=at_end,
            )

        return run_session(
            self.runner, run, console=console, output=self.output, receive=self.receive,
            notices={signal.SIGUSR1: self.refresh},
        )

    def close(self) -> None:
        self.runner.close()
        for fd in (self.input_read, self.input_write, self.output_read, self.output_write):
            os.close(fd)


def idle(vcpu: FakeVcpu) -> int:
    return vcpu.halt()


def loop_of(
    rig: Rig, vcpu: FakeVcpu, name: str, machine: list[VcpuLoop] | None = None,
    can_be_woken: Callable[[], bool] = lambda: False,
) -> VcpuLoop:
    """A loop for one of several vCPUs, whose registers are said to be ``name``."""
    return VcpuLoop(
        vcpu, pio=rig.pio, mmio=rig.mmio, describe=lambda: name, finish=rig.runner.finish,
        machine=machine, can_be_woken=can_be_woken,
    )


class SpinningVcpu(FakeVcpu):
    """Never leaves its guest but by a kick, as KVM_RUN with a busy guest: 100 % of a CPU."""

    def __init__(self) -> None:
        super().__init__(self.spin)

    def spin(self, _: FakeVcpu) -> int:
        while not self.kicked.is_set():
            hashlib.sha256(bytes(4096)).digest()  # without the GIL, as in KVM_RUN
        raise InterruptedError
