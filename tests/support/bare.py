"""Assemble guests of guest/bare and run them on this host's /dev/kvm: no Linux, no device model."""

from __future__ import annotations

import contextlib
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyvmm.kvm.abi import kvm_regs
from pyvmm.kvm.exits import Direction, Exit, IoExit, MmioExit, decode
from pyvmm.kvm.handles import Kvm, Vcpu, Vm
from pyvmm.memory import GuestMemory
from pyvmm.x86 import cpu, cpuid, layout
from pyvmm.x86.trial import deadline
from tests.support.patience import patient

SOURCES = Path(__file__).resolve().parents[2] / "guest" / "bare"
LONG_MODE_ENTRY = 0x100000
REAL_MODE_ENTRY = 0x1000
MEMORY_BYTES = 2 << 20
DEADLINE_S = 20.0


def assemble(name: str, address: int, folder: Path) -> bytes:
    """The machine code of ``guest/bare/<name>.S`` for ``address``."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("gcc is not installed: apt-get install gcc")
    output = folder / f"{name}.bin"
    build = subprocess.run(
        [
            compiler, "-nostdlib", "-static", "-Wl,--oformat=binary", "-Wl,--build-id=none",
            f"-Wl,-Ttext={address:#x}", "-o", str(output), str(SOURCES / f"{name}.S"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if build.returncode:
        pytest.fail(f"{name}.S does not assemble:\n{build.stderr}")
    return output.read_bytes()


@dataclass
class BareMachine:
    """A VM with 2 MiB of RAM and one vCPU, and what its guest did."""

    vm: Vm
    vcpu: Vcpu
    memory: GuestMemory
    written: list[tuple[int, int, int]] = field(default_factory=list)
    """Port writes: (port, size in bytes, value)."""
    stored: list[tuple[int, bytes]] = field(default_factory=list)
    """MMIO writes: (address, data)."""
    port_input: list[int] = field(default_factory=list)
    """What port reads get, item by item."""
    loads: dict[int, int] = field(default_factory=dict)
    """What MMIO reads get, by address."""

    def load(self, code: bytes, entry: int) -> None:
        """Put ``code`` at ``entry``, to be run in 64-bit mode as a kernel would be."""
        self.memory.write(entry, code)
        cpu.setup_long_mode(self.memory, self.vcpu, entry, layout.BOOT_PARAMS)

    def load_protected_mode(self, code: bytes, entry: int) -> None:
        """Put ``code`` at ``entry``, to be run in 32-bit mode as a kernel's PVH entry would be."""
        self.memory.write(entry, code)
        cpu.setup_protected_mode(self.memory, self.vcpu, entry, layout.START_INFO)

    def load_real_mode(self, code: bytes, entry: int) -> None:
        """Put ``code`` at ``entry``, to be run in 16-bit mode with code segment 0."""
        self.memory.write(entry, code)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = 0, 0
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(kvm_regs(rip=entry, rflags=2))

    def run(self) -> Exit:
        """Run to the first exit that is not a port or memory access; fails after 20 s."""
        with deadline(self.vcpu, patient(DEADLINE_S)):
            while True:
                try:
                    self.vcpu.run()
                except InterruptedError:
                    pytest.fail(f"the guest is still running:\n{self.describe()}")
                seen = decode(self.vcpu.page)
                if isinstance(seen, IoExit):
                    self._serve_port(seen)
                elif isinstance(seen, MmioExit):
                    self._serve_mmio(seen)
                else:
                    return seen

    def describe(self) -> str:
        """The vCPU's state, for a failure's message."""
        return cpu.describe_vcpu(self.memory, self.vcpu)

    def _serve_port(self, seen: IoExit) -> None:
        page = self.vcpu.page
        for offset in range(
            seen.data_offset, seen.data_offset + seen.size * seen.count, seen.size
        ):
            if seen.direction is Direction.OUT:
                self.written.append((seen.port, seen.size, page.get_int(offset, seen.size)))
            else:
                page.set_int(offset, seen.size, self.port_input.pop(0))

    def _serve_mmio(self, seen: MmioExit) -> None:
        if seen.is_write:
            self.stored.append((seen.address, seen.data))
        else:
            self.vcpu.page.set_mmio_data(self.loads[seen.address])


@contextlib.contextmanager
def bare_machine(*, chips: bool = False) -> Iterator[BareMachine]:
    """A machine without interrupt chips, so that HLT is an exit; with ``chips`` all of KVM's."""
    with (
        GuestMemory([(0, MEMORY_BYTES)]) as memory,
        Kvm() as kvm,
        kvm.create_vm() as vm,
    ):
        vm.set_tss_addr(layout.TSS)
        vm.set_identity_map_addr(layout.IDENTITY_MAP)
        vm.set_user_memory_region(0, 0, MEMORY_BYTES, memory.regions[0].host_address)
        if chips:
            vm.create_irqchip()
            vm.create_pit2()
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid(cpuid.build(
                kvm.supported_cpuid(), cpuid.CpuModel(), 0, tsc_deadline=chips
            ))
            yield BareMachine(vm, vcpu, memory)


@contextlib.contextmanager
def host_page() -> Iterator[tuple[memoryview, int]]:
    """A page of this process's memory and its address, for a slot of its own."""
    with GuestMemory([(0, mmap.PAGESIZE)]) as page:
        view = page.view(0, mmap.PAGESIZE)
        try:
            yield view, page.regions[0].host_address
        finally:
            view.release()
