"""A run in threads of its own, without KVM."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

from pyvmm.board.bus import Bus
from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.report import Reporter
from pyvmm.run.io_loop import IoSource
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import VcpuLoop
from tests.support.runner_rig import FakeVcpu, idle


class Started:
    """A runner in threads of its own, with one vCPU and one doorbell."""

    def __init__(self, vcpu: FakeVcpu | None = None) -> None:
        self.said = io.StringIO()
        self.runner = Runner(Reporter(self.said))
        self.vcpu = vcpu or FakeVcpu(idle)
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.service: Callable[[], float | None] = lambda: None
        self.at_end: list[Callable[[], None]] = []
        self.printed = bytearray()
        self.output = OutputBuffer(None, self.runner.wake, self.printed.extend)

    def start(self) -> None:
        self.loop = loop = VcpuLoop(
            self.vcpu, pio=Bus("PIO", 0), mmio=Bus("MMIO", 12), describe=str,
            finish=self.runner.finish,
        )
        self.runner.start(
            vcpus=[loop], workers=[("disk", [IoSource(self.doorbell, lambda: self.service())])],
            console=Console(None, None), output=self.output, at_end=self.at_end,
        )

    def close(self) -> None:
        self.runner.close()
        os.close(self.doorbell)
