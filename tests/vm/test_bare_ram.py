"""RAM that changes under a guest's feet: KVM follows, with whatever pages it has mapped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pyvmm.kvm.exits import HltExit
from pyvmm.ram.journal import RamJournal
from pyvmm.ram.live import fork_writer
from pyvmm.ram.pages import drop_own, own_runs
from pyvmm.ram.write import image_in_memory
from tests.support.bare import LONG_MODE_ENTRY, BareMachine, bare_machine
from tests.support.patience import patient

pytestmark = pytest.mark.bare

COUNTER = 0x180000
# again: inc dword [COUNTER]; mov eax, [COUNTER]; out 0x80, eax; hlt; jmp again
COUNT = bytes.fromhex("ff0425 00001800 8b0425 00001800 e780 f4 ebed")


def counted(machine: BareMachine) -> int:
    """Let the guest count on to its next HLT; return what it says."""
    assert machine.run() == HltExit(), machine.describe()
    return machine.written[-1][2]


def test_a_guest_goes_on_over_an_image_and_back() -> None:
    with bare_machine() as machine:
        machine.load(COUNT, LONG_MODE_ENTRY)
        assert [counted(machine) for _ in range(3)] == [1, 2, 3]
        with image_in_memory(machine.memory) as image:
            machine.memory.map_image(image)  # in place of anonymous memory, maybe a huge page
        assert [counted(machine) for _ in range(3)] == [4, 5, 6]
        for _ in range(3):
            drop_own(machine.memory)
            assert own_runs(machine.memory) == []
            assert [counted(machine) for _ in range(2)] == [4, 5]


def test_a_guest_goes_back_to_any_checkpoint() -> None:
    with bare_machine() as machine:
        machine.load(COUNT, LONG_MODE_ENTRY)
        with RamJournal(machine.memory, max_bytes=1 << 20) as journal:
            taken = {}
            for _ in range(20):
                value = counted(machine)
                taken[journal.checkpoint()] = value
            for number in (20, 13, 12, 1):
                journal.rewind(number)
                assert counted(machine) == taken[number] + 1
            later = journal.checkpoint()
            assert counted(machine) == 3
            journal.rewind(later)
            assert counted(machine) == 3


def test_a_child_that_writes_ram_keeps_no_part_of_the_vm(tmp_path: Path) -> None:
    """Else the VM, and the kernel's memory for it, lived as long as the child."""
    with bare_machine() as machine, (tmp_path / "ram").open("xb") as file:
        machine.load(COUNT, LONG_MODE_ENTRY)
        counted(machine)
        assert "kvm-vcpu" in Path("/proc/self/maps").read_text("ascii")
        with fork_writer(machine.memory, file.fileno()) as writer:
            os.kill(writer.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, writer.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert "kvm-vcpu" not in Path(f"/proc/{writer.pid}/maps").read_text("ascii")
            os.kill(writer.pid, signal.SIGCONT)
            writer.wait(patient(30))
        assert counted(machine) == 2
