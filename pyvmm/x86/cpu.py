"""The boot processor's state before the first instruction, and its description after the last.

There are two such states, one for each ``EntryKind`` of a kernel:

* "The Linux/x86 Boot Protocol", section 1.15 *64-bit boot protocol*: long mode, paging on with the
  kernel and boot_params identity-mapped, a GDT with flat ``__BOOT_CS`` (0x10) and ``__BOOT_DS``
  (0x18), interrupts off, rsi = address of boot_params.
* Xen's docs/misc/pvh.pandoc, *x86/HVM direct boot ABI*: 32-bit protected mode without paging, flat
  segments, an active TSS, interrupts off, ebx = address of hvm_start_info.

Bit names are those of AMD64 APM volume 2 and Intel SDM volume 3.
"""

from __future__ import annotations

import struct

from pyvmm.errors import GuestMemoryError, KvmError
from pyvmm.kvm.abi import kvm_fpu, kvm_regs, kvm_segment, kvm_sregs
from pyvmm.kvm.handles import Vcpu
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.image import EntryKind, Kernel

BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20

_CR0_PE = 1 << 0
_CR0_MP = 1 << 1
_CR0_ET = 1 << 4
_CR0_NE = 1 << 5
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME = 1 << 8
_EFER_LMA = 1 << 10
_RFLAGS_ALWAYS_ONE = 1 << 1

_PRESENT, _WRITABLE, _LARGE = 1 << 0, 1 << 1, 1 << 7
_LARGE_PAGE_BYTES = 2 << 20
_ENTRIES = PAGE_SIZE // 8
_DIRECTORIES = 4  # of 1 GiB each

_CODE_SEGMENT = 0xB  # execute/read, accessed
_DATA_SEGMENT = 0x3  # read/write, accessed
_BUSY_TSS_32 = 0xB
_TSS_LIMIT = 0x67

_MSR_MISC_ENABLE, _FAST_STRINGS = 0x1A0, 1 << 0
_MSR_MTRR_DEF_TYPE, _MTRR_ENABLE, _WRITE_BACK = 0x2FF, 1 << 11, 6

_FCW_DEFAULT = 0x37F  # as after FNINIT: all exceptions masked, extended precision
_MXCSR_DEFAULT = 0x1F80
_MAX_INSTRUCTION = 15


def setup_boot(memory: GuestMemory, vcpu: Vcpu, kernel: Kernel) -> None:
    """Leave ``vcpu`` about to execute ``kernel``, which ``loader.write_boot_info`` has prepared.

    Errors are those of ``setup_long_mode``.
    """
    if kernel.entry_kind is EntryKind.PVH:
        setup_protected_mode(memory, vcpu, kernel.entry, layout.START_INFO)
    else:
        setup_long_mode(memory, vcpu, kernel.entry, layout.BOOT_PARAMS)


def setup_long_mode(memory: GuestMemory, vcpu: Vcpu, entry: int, boot_params_gpa: int) -> None:
    """Leave ``vcpu`` about to execute ``entry`` (a guest physical address) in 64-bit mode.

    Writes page tables and GDT to low guest RAM (see ``layout``).  GuestMemoryError if RAM does
    not reach so far, KvmError if KVM refuses the state.
    """
    write_page_tables(memory)
    write_gdt(memory, _code_segment())
    vcpu.set_sregs(_long_mode(vcpu.get_sregs()))
    _set_registers(vcpu, kvm_regs(rip=entry, rsi=boot_params_gpa))


def setup_protected_mode(
    memory: GuestMemory, vcpu: Vcpu, entry: int, start_info_gpa: int
) -> None:
    """Leave ``vcpu`` about to execute ``entry`` (a guest physical address) in 32-bit mode.

    Writes a GDT to low guest RAM (see ``layout``).  GuestMemoryError if RAM does not reach so
    far, KvmError if KVM refuses the state.
    """
    write_gdt(memory, _code_segment_32())
    vcpu.set_sregs(_protected_mode(vcpu.get_sregs()))
    _set_registers(vcpu, kvm_regs(rip=entry, rbx=start_info_gpa))


def _set_registers(vcpu: Vcpu, regs: kvm_regs) -> None:
    """Set ``regs``, a stack, interrupts off, and the rest that is the same for every kernel."""
    regs.rsp, regs.rflags = layout.BOOT_STACK, _RFLAGS_ALWAYS_ONE
    vcpu.set_regs(regs)
    vcpu.set_fpu(kvm_fpu(fcw=_FCW_DEFAULT, mxcsr=_MXCSR_DEFAULT))
    vcpu.set_msrs(boot_msrs())


def boot_msrs() -> dict[int, int]:
    """Return the MSRs that firmware would have set: fast strings on, memory write-back by
    default."""
    return {
        _MSR_MISC_ENABLE: _FAST_STRINGS,
        _MSR_MTRR_DEF_TYPE: _MTRR_ENABLE | _WRITE_BACK,
    }


def write_page_tables(memory: GuestMemory) -> None:
    """Map the first 4 GiB onto themselves in 2 MiB pages, at ``layout.PAGE_TABLES``."""
    pml4 = layout.PAGE_TABLES
    pdpt = pml4 + PAGE_SIZE
    directories = pdpt + PAGE_SIZE
    table = _PRESENT | _WRITABLE
    memory.write_int(pml4, 8, pdpt | table)
    for index in range(_DIRECTORIES):
        memory.write_int(pdpt + 8 * index, 8, (directories + PAGE_SIZE * index) | table)
    leaves = range(table | _LARGE, _DIRECTORIES * _ENTRIES * _LARGE_PAGE_BYTES, _LARGE_PAGE_BYTES)
    memory.write(directories, struct.pack(f"<{len(leaves)}Q", *leaves))


def write_gdt(memory: GuestMemory, code: kvm_segment) -> None:
    """Write two unused descriptors, then ``code``, flat data and a TSS, at ``layout.GDT``."""
    for segment in (code, _data_segment(), _task_segment()):
        memory.write_int(layout.GDT + segment.selector, 8, descriptor(segment))


def descriptor(segment: kvm_segment) -> int:
    """The eight bytes of a GDT entry that loads as ``segment`` (APM 2, 4.7 and 4.8).

    The limit is in 4 KiB pages if ``g`` is set: 20 bits of it are stored.
    """
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    value: int = (
        (limit & 0xFFFF)
        | (segment.base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )
    return value


def _code_segment() -> kvm_segment:
    return kvm_segment(
        limit=0xFFFF_FFFF, selector=BOOT_CS, type=_CODE_SEGMENT, present=1, s=1, l=1, g=1
    )


def _code_segment_32() -> kvm_segment:
    return kvm_segment(
        limit=0xFFFF_FFFF, selector=BOOT_CS, type=_CODE_SEGMENT, present=1, s=1, db=1, g=1
    )


def _data_segment() -> kvm_segment:
    return kvm_segment(
        limit=0xFFFF_FFFF, selector=BOOT_DS, type=_DATA_SEGMENT, present=1, s=1, db=1, g=1
    )


def _task_segment() -> kvm_segment:
    return kvm_segment(limit=_TSS_LIMIT, selector=BOOT_TSS, type=_BUSY_TSS_32, present=1)


def _flat_segments(sregs: kvm_sregs, code: kvm_segment) -> None:
    sregs.cs = code
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, _data_segment())
    sregs.gdt.base, sregs.gdt.limit = layout.GDT, BOOT_TSS + 7
    sregs.idt.base, sregs.idt.limit = 0, 0


def _protected_mode(sregs: kvm_sregs) -> kvm_sregs:
    _flat_segments(sregs, _code_segment_32())
    sregs.tr = _task_segment()
    sregs.cr0 = _CR0_PE | _CR0_ET
    sregs.cr3 = sregs.cr4 = sregs.efer = 0
    return sregs


def _long_mode(sregs: kvm_sregs) -> kvm_sregs:
    _flat_segments(sregs, _code_segment())
    sregs.cr0 = _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE | _CR0_PG
    sregs.cr3 = layout.PAGE_TABLES
    sregs.cr4 = _CR4_PAE
    sregs.efer = _EFER_LME | _EFER_LMA
    return sregs


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
