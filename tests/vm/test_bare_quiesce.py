"""Real vCPUs and a busy doorbell, quiesced: nobody is served and no byte of RAM changes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.run.io_loop import IoSource
from pyvmm.run.outcome import Kind, Outcome
from tests.support.bare import LONG_MODE_ENTRY, MEMORY_BYTES, assemble
from tests.support.patience import patient
from tests.vm.test_bare_smp import COUNTER, load, machine

pytestmark = pytest.mark.bare

DOORBELL_PORT = 0x3F0  # of ring_and_count.S
SERVED = 0x190000
DEADLINE_S = 20.0
STEADY_S = 0.1


@pytest.mark.parametrize("cpus", range(1, 9))
def test_nothing_moves_while_a_busy_machine_is_quiesced(tmp_path: Path, cpus: int) -> None:
    doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with machine(irqchip=False, cpus=cpus) as smp:
        code = assemble("ring_and_count", LONG_MODE_ENTRY, tmp_path)
        for index in range(cpus):
            load(smp, code, index)
        smp.vm.ioeventfd(doorbell, DOORBELL_PORT, 1, pio=True)
        passes = [0]

        def serve() -> None:
            """A request: it reads guest RAM and writes it."""
            passes[0] += 1
            smp.memory.write_int(SERVED, 4, smp.memory.read_int(COUNTER, 4))

        def wait_for_progress() -> None:
            before, counted = passes[0], smp.memory.read_int(COUNTER, 4)
            until_s = time.monotonic() + patient(DEADLINE_S)
            while passes[0] < before + 2 or smp.memory.read_int(COUNTER, 4) == counted:
                assert time.monotonic() < until_s
                time.sleep(0.001)

        runner = smp.runner
        runner.start(
            vcpus=smp.loops, workers=[("disk", [IoSource(doorbell, serve)])],
            console=Console(None, None), output=OutputBuffer(None, runner.wake, lambda _: None),
        )
        took_s = []
        for _ in range(3):
            wait_for_progress()
            started_s = time.monotonic()
            assert runner.quiesce(patient(DEADLINE_S))
            took_s.append(time.monotonic() - started_s)
            served, memory = passes[0], smp.memory.read(0, MEMORY_BYTES)
            time.sleep(STEADY_S)
            assert passes[0] == served
            assert smp.memory.read(0, MEMORY_BYTES) == memory
            runner.resume()
        wait_for_progress()
        assert runner.quiesce(patient(DEADLINE_S))
        assert runner.stop(Outcome(Kind.RESET)) == Outcome(Kind.RESET)
    os.close(doorbell)
    print(f"quiesced within {', '.join(f'{1000 * s:.1f}' for s in took_s)} ms")
