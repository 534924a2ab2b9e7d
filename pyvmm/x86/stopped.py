"""A vCPU that has stopped: its description for a person, and whether a program runs on it.

Apart from ``x86.cpu``, because a machine of a snapshot loads nothing else of that, and a jailed
process cannot load it at the end.
"""

from __future__ import annotations

from pyvmm.errors import GuestMemoryError, KvmError
from pyvmm.kvm.handles import Vcpu
from pyvmm.memory import PAGE_SIZE, GuestMemory

_MAX_INSTRUCTION = 15

_REGISTER_ROWS = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rsp", "rbp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)


def runs_program(vcpu: Vcpu) -> bool:
    """Return True if Linux, on this vCPU, runs a program or serves a system call of one.

    Programs keep their thread's data at FS.base, and Linux leaves it there while it serves them.
    It is 0 in kernel threads, of which the boot is one, and before.
    """
    return bool(vcpu.get_sregs().fs.base)


def describe_vcpu(memory: GuestMemory, vcpu: Vcpu) -> str:
    """Describe the stopped vCPU for a person: rip, the bytes there, registers; several lines."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    linear = regs.rip if sregs.cs.l else (sregs.cs.base + regs.rip) & 0xFFFF_FFFF
    lines = [
        f"rip {regs.rip:#018x} rflags {regs.rflags:#x}",
        f"code {_code_at(memory, vcpu, linear)}",
    ]
    for row in _REGISTER_ROWS:
        lines.append(" ".join(f"{name:>3} {getattr(regs, name):016x}" for name in row))
    lines.append(
        " ".join(f"{name} {getattr(sregs, name):x}" for name in ("cr0", "cr2", "cr3", "cr4"))
        + f" efer {sregs.efer:x} cs {sregs.cs.selector:x} ss {sregs.ss.selector:x}"
    )
    return "\n".join(lines)


def _code_at(memory: GuestMemory, vcpu: Vcpu, linear: int) -> str:
    """Return the bytes of at most one instruction; ``??`` from the first that is not in RAM."""
    code = b""
    while len(code) < _MAX_INSTRUCTION:
        address = (linear + len(code)) & 0xFFFF_FFFF_FFFF_FFFF
        length = min(_MAX_INSTRUCTION - len(code), PAGE_SIZE - address % PAGE_SIZE)
        try:
            gpa = vcpu.translate(address)
            if gpa is None:
                break
            code += memory.read(gpa, length)
        except (GuestMemoryError, KvmError):
            break
    cut = "" if len(code) == _MAX_INSTRUCTION else "??"
    return f"{code.hex(' ')} {cut}".strip()
