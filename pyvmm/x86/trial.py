"""A small guest that does what every stock kernel does and an incomplete KVM cannot.

A KVM may open, run bare guests and still stop Linux in its first second, because it emulates ring 0
without some instructions.  No capability tells this; only a trial does.  Each part runs in a VM of
its own, with a deadline.  The source of the code is ``guest/bare/trial.S``, and
``tests/x86/test_trial.py`` checks the bytes against it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from pyvmm.errors import HostError
from pyvmm.kvm.exits import Direction, IoExit, decode
from pyvmm.kvm.handles import Kvm, Vcpu
from pyvmm.memory import GuestMemory
from pyvmm.x86 import cpu, cpuid, layout

MEMORY_BYTES = 0x20000
CODE_GPA = 0x10000
IDT_GPA = 0x11000
REPORT_PORT = 0xF4
DEADLINE_S = 5.0
_REPEAT_S = 0.05
_IRQ = 5
_VECTORS = (3, 0x20 + _IRQ)  # breakpoint; the 8259's line 5 as the guest sets it up
_HANDLER = 0x70
_INTERRUPT_GATE = 0x8E00  # present, DPL 0, 64-bit interrupt gate (APM 2, 4.8.4)

CODE = bytes.fromhex(
    # 0x00 try_iretq: build a frame that leads to `returned`, and return to it
    "8cd0"            # mov    %ss,%eax
    "4889e1"          # mov    %rsp,%rcx
    "50"              # push   %rax              ss
    "51"              # push   %rcx              rsp
    "9c"              # pushf                    rflags
    "8cc8"            # mov    %cs,%eax
    "50"              # push   %rax              cs
    "488d050e000000"  # lea    returned(%rip),%rax
    "50"              # push   %rax              rip
    "48cf"            # iretq
    "0000000000000000000000"
    # 0x20 returned: all parts end here
    "b052"            # mov    $'R',%al
    "e6f4"            # out    %al,$0xf4
    "f4"              # hlt
    "0000000000000000000000"
    # 0x30 try_int3: a software breakpoint, as kernels patch code
    "cc"              # int3
    "ebed"            # jmp    returned
    "00000000000000000000000000"
    # 0x40 try_interrupt: set up the 8259, then wait for its line 5
    "b011e620"        # mov    $0x11,%al         ICW1: edge-triggered, cascaded, ICW4 follows
    "b020e621"        # mov    $0x20,%al         ICW2: vectors from 0x20
    "b004e621"        # mov    $0x04,%al         ICW3: slave at line 2
    "b001e621"        # mov    $0x01,%al         ICW4: 8086 mode
    "b0dfe621"        # mov    $0xdf,%al         OCW1: all but line 5 masked
    "b057"            # mov    $'W',%al
    "e6f4"            # out    %al,$0xf4         now send it
    "fb"              # sti
    "f4"              # hlt
    "ebc4"            # jmp    returned
    "0000000000000000000000000000000000000000"
    # 0x70 handler: of the breakpoint and of the interrupt
    "b020e620"        # mov    $0x20,%al         end of interrupt; harmless without one
    "b048"            # mov    $'H',%al
    "e6f4"            # out    %al,$0xf4
    "48cf"            # iretq
    "000000000000"
    # 0x80 try_xsave: save the FPU as kernels do, if CPUID says so
    "b801000000"      # mov    $1,%eax
    "0fa2"            # cpuid
    "0fbae11a"        # bt     $26,%ecx          XSAVE
    "7393"            # jnc    returned
    "0f20e0"          # mov    %cr4,%rax
    "0d00020400"      # or     $0x40200,%eax     OSXSAVE, OSFXSR
    "0f22e0"          # mov    %rax,%cr4
    "31c9"            # xor    %ecx,%ecx
    "0f01d0"          # xgetbv                   x87 alone after a reset: set it again
    "0f01d1"          # xsetbv
    "bf00400100"      # mov    $0x14000,%edi
    "480fae27"        # xsave64 (%rdi)
    "e972ffffff"      # jmp    returned
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing to try: ``code`` at CODE_GPA is entered at ``entry`` and writes ``expected`` to
    REPORT_PORT; after a ``W`` it waits for an interrupt."""

    name: str
    entry: int
    expected: bytes
    code: bytes = CODE


PARTS = (
    Part(name="iretq", entry=0x00, expected=b"R"),
    Part(name="int3", entry=0x30, expected=b"HR"),
    Part(name="external interrupt", entry=0x40, expected=b"WHR"),
    Part(name="xsave", entry=0x80, expected=b"R"),
)
_MEANING = {ord("W"): "waiting for it", ord("H"): "in its handler", ord("R"): "back from it"}


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The result of one part; ``detail`` tells in one line how it failed."""

    name: str
    passed: bool
    detail: str = ""


def try_part(kvm: Kvm, part: Part, *, deadline_s: float = DEADLINE_S) -> TrialResult:
    """Run ``part`` in a new VM; main thread only, because the deadline is a timer signal.

    A refusal of KVM, a dead guest and a missed deadline are results, never exceptions.
    """
    heard = bytearray()
    try:
        with contextlib.ExitStack() as stack:
            vcpu, irq_fd = _machine(kvm, part, stack)
            with deadline(vcpu, deadline_s):
                problem = _converse(vcpu, heard, part.expected, irq_fd, deadline_s)
            if problem:
                problem += f"; rip {vcpu.get_regs().rip:#x}"
    except (HostError, OSError) as error:
        problem = str(error)
    if problem and heard:
        problem += f" ({_MEANING.get(heard[-1], 'unexpected answer')})"
    return TrialResult(part.name, not problem, problem)


def run_trials(kvm: Kvm) -> list[TrialResult]:
    """Try every part in turn; main thread only."""
    return [try_part(kvm, part) for part in PARTS]


def _machine(kvm: Kvm, part: Part, stack: contextlib.ExitStack) -> tuple[Vcpu, int]:
    """Return a VM with interrupt chips, its vCPU about to run ``part``, and an eventfd on line
    5."""
    memory = stack.enter_context(GuestMemory([(0, MEMORY_BYTES)]))
    irq_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, irq_fd)
    vm = stack.enter_context(kvm.create_vm())
    vm.set_tss_addr(layout.TSS)
    vm.set_identity_map_addr(layout.IDENTITY_MAP)
    vm.create_irqchip()
    vm.set_user_memory_region(0, 0, MEMORY_BYTES, memory.regions[0].host_address)
    vm.irqfd(irq_fd, _IRQ)
    vcpu = stack.enter_context(vm.create_vcpu(0))
    vcpu.set_cpuid(cpuid.build(kvm.supported_cpuid(), cpuid.CpuModel(), 0))
    memory.write(CODE_GPA, part.code)
    cpu.setup_long_mode(memory, vcpu, CODE_GPA + part.entry, 0)
    for vector in _VECTORS:
        memory.write(IDT_GPA + 16 * vector, _gate(CODE_GPA + _HANDLER))
    sregs = vcpu.get_sregs()
    sregs.idt.base, sregs.idt.limit = IDT_GPA, 16 * (max(_VECTORS) + 1) - 1
    vcpu.set_sregs(sregs)
    return vcpu, irq_fd


def _gate(handler: int) -> bytes:
    """Return a 64-bit interrupt gate to ``handler``."""
    return struct.pack(
        "<HHHHII",
        handler & 0xFFFF,
        cpu.BOOT_CS,
        _INTERRUPT_GATE,
        handler >> 16 & 0xFFFF,
        handler >> 32,
        0,
    )


def _converse(
    vcpu: Vcpu, heard: bytearray, expected: bytes, irq_fd: int, deadline_s: float
) -> str:
    """Collect the guest's bytes in ``heard`` until all have come; return "" or what went wrong."""
    end = time.monotonic() + deadline_s
    while heard != expected:
        try:
            vcpu.run()
        except InterruptedError:
            if time.monotonic() >= end:
                return f"no answer within {deadline_s:g} s"
            continue
        seen = decode(vcpu.page)
        if not isinstance(seen, IoExit) or seen.direction is not Direction.OUT:
            return str(seen)
        heard.append(vcpu.page.get_int(seen.data_offset, 1))
        if not expected.startswith(heard):
            return f"it answered {bytes(heard)!r} instead of {expected!r}"
        if heard[-1] == ord("W"):
            os.eventfd_write(irq_fd, 1)
    return ""


@contextlib.contextmanager
def deadline(vcpu: Vcpu, seconds: float) -> Iterator[None]:
    """Make ``vcpu.run`` raise InterruptedError from ``seconds`` on; main thread only.

    Uses SIGALRM; afterwards the caller's handler is back and its timer has the rest of its time.
    Our timer repeats.  A single signal could arrive between the interpreter's check for signals and
    KVM_RUN, and the guest would go on running.
    """

    def expire(_number: int, _frame: FrameType | None) -> None:
        vcpu.request_exit()

    timer = signal.setitimer(signal.ITIMER_REAL, 0)
    handler = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
        vcpu.clear_exit_request()
