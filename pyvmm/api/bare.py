"""Bare guests: a few instructions of x86 code with RAM and ports, and nothing else.

There are no interrupt chips, no firmware and no kernel, so any /dev/kvm will do.  HLT ends the run.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable

from pyvmm.api.hooks import Hooks
from pyvmm.api.lifetime import Lifetime
from pyvmm.api.memory import MemoryHandle
from pyvmm.api.vcpus import Registers, VcpuHandle
from pyvmm.board.board import Board
from pyvmm.config import format_size
from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.errors import ConfigError
from pyvmm.kvm.abi import kvm_regs
from pyvmm.kvm.exits import Exit
from pyvmm.kvm.handles import Kvm, Vcpu
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.numerals import shown, size_in_bytes
from pyvmm.report import Reporter
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import Exits, VcpuLoop
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.x86 import cpu, cpuid, layout

if TYPE_CHECKING:
    from pyvmm.api.hook_calls import Refusal
    from pyvmm.api.hooked_bus import Access

REAL_MODE_ENTRY = 0x1000
REAL_MODE_END = 0x10000
"""Code segment 0 ends here."""
LONG_MODE_ENTRY = layout.HIGH_RAM_START
LONG_MODE_START = layout.CMDLINE
"""Below it are the page tables, the GDT and the stack."""
MAX_MEMORY_BYTES = layout.MMIO_GAP_START
MAX_TIMEOUT_S = 86400.0
_RFLAGS_ALWAYS_ONE = 1 << 1


def bare(
    code: bytes,
    *,
    bits: int = 16,
    memory: int | str = "2M",
    address: int | None = None,
    timeout_s: float | None = 10.0,
) -> BareGuest:
    """Return a guest that will run ``code``: a context manager, which closes it.

    ``bits`` is 16 for real mode or 64 for long mode, with the first 4 GiB mapped onto themselves.
    The code lies at ``address``, which is where it starts: 0x1000 or 0x100000 if not given.  The
    segments' bases are 0, interrupts are off, and there is a stack.  ``memory`` is the RAM from
    address 0, in bytes or as "2M".  After ``timeout_s`` seconds the run ends (None: never).

    ConfigError for what cannot be, HostError if this host has no KVM.
    """
    if not isinstance(code, (bytes, bytearray, memoryview)):
        raise TypeError(f"bare takes machine code as bytes, not {type(code).__name__}")
    if bits not in (16, 64):
        raise ConfigError(f"bare(bits={bits!r})", "is no mode; it takes 16 or 64")
    memory_bytes = _memory_bytes(memory)
    if address is None:
        address = REAL_MODE_ENTRY if bits == 16 else LONG_MODE_ENTRY
    _check_place(address, len(code), bits, memory_bytes)
    if timeout_s is not None and (
        isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float))
        or not 0 < timeout_s <= MAX_TIMEOUT_S
    ):
        raise ConfigError(
            f"bare(timeout_s={timeout_s!r})",
            f"takes seconds, more than 0 and up to {MAX_TIMEOUT_S:g}, or None",
        )
    return BareGuest(bytes(code), bits, memory_bytes, address, timeout_s)


class BareGuest:
    """A guest made by ``bare``; runs once.

    The methods may be called from any thread; those that wait raise RuntimeError in a hook.
    ``board``, ``loops`` and ``runner`` are the parts of the machine.
    """

    def __init__(
        self, code: bytes, bits: int, memory_bytes: int, address: int, timeout_s: float | None
    ) -> None:
        self._timeout_s = timeout_s
        self._judging = threading.Lock()
        self._registers_at_end = ""
        with contextlib.ExitStack() as stack:
            memory = stack.enter_context(GuestMemory([(0, memory_bytes)]))
            memory.write(address, code)
            report = stack.enter_context(contextlib.closing(Reporter()))
            self.runner = stack.enter_context(contextlib.closing(Runner(report)))
            self.board = Board(memory, stack, maps_pages=False, report=report)
            self.loops = [_make_loop(self.board, self.runner, bits, address, stack)]
            self._resources = stack.pop_all()
        self._console = Console(None, None)
        self._output = OutputBuffer(None, self.runner.wake, lambda data: None)
        self._hooks = Hooks(self)
        self._lifetime = Lifetime(self.runner, "the guest")
        self._vcpu = VcpuHandle(self.loops[0], self.runner)
        self.memory = MemoryHandle(memory)
        """The guest's RAM."""

    # Hooks

    def on_port(
        self, ports: int | range, hook: Callable[[Access], int | Refusal | None]
    ) -> None:
        """Have ``hook`` asked at each access to one of ``ports``: see ``Hooks.on_port``."""
        self._lifetime.check_open("on_port()")
        self._hooks.on_port(ports, hook)

    def on_mmio(
        self, addresses: int | range, hook: Callable[[Access], int | Refusal | None]
    ) -> None:
        """Have ``hook`` asked at each access to one of ``addresses``: see ``Hooks.on_mmio``."""
        self._lifetime.check_open("on_mmio()")
        self._hooks.on_mmio(addresses, hook)

    def on_exit(self, hook: Callable[[int, Exit], int | Refusal | None]) -> None:
        """Have ``hook(0, exit)`` asked at each exit: see ``Hooks.on_exit``."""
        self._lifetime.check_open("on_exit()")
        self._hooks.on_exit(hook)

    # The vCPU

    @property
    def registers(self) -> Registers:
        """Return the registers: see ``VcpuHandle.registers``."""
        return self._vcpu.registers

    def set_registers(self, **changes: int) -> None:
        """Set the registers that are named: see ``VcpuHandle.set_registers``."""
        self._vcpu.set_registers(**changes)

    @property
    def exits(self) -> Exits:
        """Return how often the guest was left, once it has run."""
        return self.loops[0].exits

    # Running

    def run(self) -> Outcome:
        """Start the guest, wait for its end and return how it ended.

        SHUTDOWN after HLT, TRIPLE_FAULT, INTERNAL_ERROR, TIMEOUT, HOST_ERROR after a hook that
        raised, STOPPED after ``stop``.  ``detail`` has the registers of a guest that did not halt.
        """
        self.start()
        outcome = self.wait()
        assert outcome is not None  # without a limit of time
        return outcome

    def start(self) -> None:
        """Start the guest in threads of its own; once."""
        with self._lifetime.starting():
            if self.runner.has_begun:
                raise RuntimeError("a bare guest runs once: make another")
            if self._timeout_s is not None:
                self.runner.finish_after(self._timeout_s, Outcome(Kind.TIMEOUT))
            self.runner.start(
                vcpus=self.loops, workers=(), console=self._console, output=self._output
            )

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Return how the run ended, None after ``timeout_s`` seconds."""
        self._lifetime.check_open("wait()")
        if not self.runner.has_begun:
            raise RuntimeError("wait(): the guest was not started")
        outcome = self.runner.wait(timeout_s)
        if outcome is None or outcome.kind is not Kind.TIMEOUT:
            return outcome
        with self._judging:  # whoever closes the guest waits here, too, before the vCPU is gone
            if not self._registers_at_end:
                self._registers_at_end = cpu.describe_vcpu(self.board.memory, self.loops[0].vcpu)
        return outcome.replace(
            detail=f"after {self._timeout_s:g} s\n{self._registers_at_end}"
        )

    def pause(self, timeout_s: float | None = None) -> bool:
        """Pause the guest: see ``Runner.pause``."""
        self._lifetime.check_open("pause()")
        return self.runner.pause(timeout_s)

    def resume(self) -> None:
        """Let a paused guest go on."""
        self._lifetime.check_open("resume()")
        self.runner.resume()

    def stop(self) -> Outcome | None:
        """End the run unless it has ended, wait, and return how it ended; None if it never began.
        """
        self._lifetime.check_open("stop()")
        return self._end() if self._lifetime.has_begun("stop()") else None

    def finish(self) -> None:
        """Have the run end, without waiting for it: also in a hook."""
        self._lifetime.check_open("finish()")
        self.runner.finish(Outcome(Kind.STOPPED))

    def close(self) -> None:
        """Stop the guest and free what it has; idempotent."""
        self._lifetime.close(self._end, self._free)

    def _end(self) -> Outcome | None:
        self.runner.stop(Outcome(Kind.STOPPED))
        return self.wait()

    def _free(self) -> None:
        if self.runner.stopped:  # a thread that is stuck still uses them
            self._resources.close()

    def __del__(self) -> None:
        if "_lifetime" in self.__dict__:
            self._lifetime.forget(self.close)

    def __enter__(self) -> BareGuest:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _make_loop(
    board: Board, runner: Runner, bits: int, address: int, stack: contextlib.ExitStack
) -> VcpuLoop:
    """Return what runs a new vCPU, in a VM with the board's memory, about to execute ``address``.
    """
    kvm = stack.enter_context(Kvm())
    vm = stack.enter_context(kvm.create_vm())
    vm.set_tss_addr(layout.TSS)
    vm.set_identity_map_addr(layout.IDENTITY_MAP)
    board.map_memory(vm, can_map_pages=False)
    vcpu = stack.enter_context(vm.create_vcpu(0))
    vcpu.set_cpuid(cpuid.build(kvm.supported_cpuid(), cpuid.CpuModel(), 0))
    if bits == 64:
        cpu.setup_long_mode(board.memory, vcpu, address, 0)
    else:
        _set_real_mode(vcpu, address)
    return VcpuLoop(
        vcpu, pio=board.pio, mmio=board.mmio, finish=runner.finish,
        describe=functools.partial(cpu.describe_vcpu, board.memory, vcpu),
    )


def _set_real_mode(vcpu: Vcpu, address: int) -> None:
    """Have ``vcpu`` execute ``address`` in code segment 0, with its stack below REAL_MODE_ENTRY."""
    sregs = vcpu.get_sregs()
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
        segment.base, segment.selector = 0, 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=address, rsp=REAL_MODE_ENTRY, rflags=_RFLAGS_ALWAYS_ONE))


def _memory_bytes(memory: int | str) -> int:
    """Return the bytes that ``memory`` asks for; ConfigError."""
    count: int | None = None
    if isinstance(memory, str):
        count = size_in_bytes(memory, MAX_MEMORY_BYTES)
    elif isinstance(memory, int) and not isinstance(memory, bool):
        count = memory
    if count is None or not PAGE_SIZE <= count <= MAX_MEMORY_BYTES or count % PAGE_SIZE:
        raise ConfigError(
            f"bare(memory={shown(repr(memory))})",
            f"takes bytes or a size as 2M: whole pages of {PAGE_SIZE} bytes, from "
            f"{format_size(PAGE_SIZE)} to {format_size(MAX_MEMORY_BYTES)}",
        )
    return count


def _check_place(address: int, length: int, bits: int, memory_bytes: int) -> None:
    """ConfigError unless ``length`` bytes of code may lie at ``address``."""
    if isinstance(address, bool) or not isinstance(address, int):
        raise TypeError(f"bare: the address is a {type(address).__name__}, not an int")
    start, end = (0, min(REAL_MODE_END, memory_bytes)) if bits == 16 else (
        LONG_MODE_START, memory_bytes
    )
    if not length:
        raise ConfigError("bare(code)", "is empty; it takes machine code")
    if not start <= address <= end - length:
        raise ConfigError(
            f"bare(address={address:#x})",
            f"leaves no room for {length} bytes of code; {bits}-bit code lies in RAM from "
            f"{start:#x} to {max(end, start):#x}",
        )
