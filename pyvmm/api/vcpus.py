"""The vCPUs for a script: their registers, while the guest does not run."""

from __future__ import annotations

import threading

from pyvmm.kvm.abi import kvm_regs, kvm_sregs
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import VcpuLoop
from pyvmm.startup.types import Record

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)
CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
SEGMENTS = ("cs", "ss", "ds")
_BASES = tuple(f"{name}_base" for name in SEGMENTS)


class Registers(Record):
    """The registers of a vCPU.  A segment has two: its selector and its base."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int
    cs: int
    cs_base: int
    ss: int
    ss_base: int
    ds: int
    ds_base: int

    def __str__(self) -> str:
        words = [f"{name} {getattr(self, name):#x}" for name in (*GENERAL, *CONTROL)]
        words += [
            f"{name} {getattr(self, name):#x} (base {getattr(self, f'{name}_base'):#x})"
            for name in SEGMENTS
        ]
        return " ".join(words)


class VcpuHandle:
    """``machine.vcpus[i]``: the vCPU of ``loop``, which ``runner`` runs."""

    def __init__(self, loop: VcpuLoop, runner: Runner) -> None:
        self._loop = loop
        self._runner = runner

    @property
    def index(self) -> int:
        """The vCPU's number, which is also its APIC ID."""
        return self._loop.vcpu.index

    @property
    def registers(self) -> Registers:
        """Return the registers while the machine is paused, before its start or after its end.

        Also in a hook, of the vCPU that it watches.  RuntimeError at any other time, and once the
        machine is closed.
        """
        self._check("registers", may_be_in_hook=True)
        regs, sregs = self._loop.vcpu.get_regs(), self._loop.vcpu.get_sregs()
        values = {name: int(getattr(regs, name)) for name in GENERAL}
        values |= {name: int(getattr(sregs, name)) for name in CONTROL}
        for name, base in zip(SEGMENTS, _BASES, strict=True):
            values[name] = int(getattr(sregs, name).selector)
            values[base] = int(getattr(sregs, name).base)
        return Registers(**values)

    def set_registers(self, **changes: int) -> None:
        """Set the registers that are named: ``set_registers(rax=1, rip=0x1000)``.

        A selector and its base are set as they are given; nothing is loaded from the GDT.
        RuntimeError as for ``registers``, and in a hook.  TypeError for other names, ValueError for
        numbers that do not fit, KvmError for values that KVM refuses.
        """
        self._check("set_registers()", may_be_in_hook=False)
        for name, value in changes.items():
            if name not in Registers._fields:
                raise TypeError(
                    f"set_registers knows no {name}; it knows {', '.join(Registers._fields)}"
                )
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"set_registers: {name} is a {type(value).__name__}, not an int")
            bits = 16 if name in SEGMENTS else 64
            if not 0 <= value < 1 << bits:
                raise ValueError(f"set_registers: {name} {value:#x} does not fit into {bits} bits")
        vcpu = self._loop.vcpu
        if not changes.keys().isdisjoint(GENERAL):
            regs: kvm_regs = vcpu.get_regs()
            for name in changes.keys() & set(GENERAL):
                setattr(regs, name, changes[name])
            vcpu.set_regs(regs)
        if not changes.keys() <= set(GENERAL):
            sregs: kvm_sregs = vcpu.get_sregs()
            for name in changes.keys() - set(GENERAL):
                if name in CONTROL:
                    setattr(sregs, name, changes[name])
                elif name in SEGMENTS:
                    getattr(sregs, name).selector = changes[name]
                else:
                    getattr(sregs, name.removesuffix("_base")).base = changes[name]
            vcpu.set_sregs(sregs)

    def _check(self, what: str, *, may_be_in_hook: bool) -> None:
        if self._loop.vcpu.fd < 0:
            raise RuntimeError(f"{what}: the machine is closed")
        is_own = may_be_in_hook and self._loop.thread_ident == threading.get_ident()
        if not is_own and not self._runner.has_resting_vcpus:
            raise RuntimeError(f"{what}: the guest runs; pause the machine first")
