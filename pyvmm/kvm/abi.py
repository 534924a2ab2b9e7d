"""The numbers and structures of <linux/kvm.h> that pyvmm uses, under the kernel's own names.

No logic lives here.  ``tests/kvm/test_abi.py`` compiles a C probe against the system's headers.  It
compares every ioctl number, constant, structure size and field offset that it finds below, so a new
line here is checked without further work.

ctypes stores a value that does not fit by cutting it, and takes a misspelt field as a new Python
attribute; ``Structure`` refuses both.
"""

from __future__ import annotations

import ctypes
from types import MappingProxyType

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_s32 = ctypes.c_int32


class Structure(ctypes.Structure):
    """A kernel structure: unknown fields are AttributeError, values cut short ValueError."""

    def __setattr__(self, name: str, value: object) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        super().__setattr__(name, value)
        if isinstance(value, int) and getattr(self, name) != value:
            raise ValueError(f"{type(self).__name__}.{name}: {value:#x} does not fit")


class Ioctl(int):
    """An ioctl request number, told from other numbers by its type."""


_Field = type[ctypes.c_uint8 | ctypes.c_uint16 | ctypes.c_uint32 | ctypes.c_uint64 | Structure]


def _each(kind: _Field, names: str) -> list[tuple[str, _Field]]:
    """Fields of one type, in order."""
    return [(name, kind) for name in names.split()]


# <asm-generic/ioctl.h>: direction in bits 30-31, size in 16-29, type in 8-15, number in 0-7.
_NONE, _WRITE, _READ = 0, 1, 2
_KVMIO = 0xAE


def _ioc(direction: int, number: int, size: int) -> Ioctl:
    return Ioctl(direction << 30 | size << 16 | _KVMIO << 8 | number)


def _IO(number: int) -> Ioctl:
    return _ioc(_NONE, number, 0)


def _IOW(number: int, argument: _Field) -> Ioctl:
    return _ioc(_WRITE, number, ctypes.sizeof(argument))


def _IOR(number: int, argument: _Field) -> Ioctl:
    return _ioc(_READ, number, ctypes.sizeof(argument))


def _IOWR(number: int, argument: _Field) -> Ioctl:
    return _ioc(_READ | _WRITE, number, ctypes.sizeof(argument))


# --- Structures of the VM fd -------------------------------------------------------------------


class kvm_userspace_memory_region(Structure):
    _fields_ = [
        *_each(_u32, "slot flags"),
        *_each(_u64, "guest_phys_addr memory_size userspace_addr"),
    ]


KVM_MEM_READONLY = 1 << 1


class kvm_irq_level(Structure):
    _fields_ = [("irq", _u32), ("level", _u32)]


class kvm_pit_config(Structure):
    _fields_ = [("flags", _u32), ("pad", _u32 * 15)]


KVM_PIT_SPEAKER_DUMMY = 1


class kvm_irqfd(Structure):
    _fields_ = [*_each(_u32, "fd gsi flags resamplefd"), ("pad", _u8 * 16)]


KVM_IRQFD_FLAG_DEASSIGN = 1 << 0


class kvm_ioeventfd(Structure):
    _fields_ = [
        *_each(_u64, "datamatch addr"),
        ("len", _u32),
        ("fd", _s32),
        ("flags", _u32),
        ("pad", _u8 * 36),
    ]


KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2

# --- Structures of the vCPU fd -----------------------------------------------------------------


class kvm_regs(Structure):
    _fields_ = [
        *_each(_u64, "rax rbx rcx rdx rsi rdi rsp rbp"),
        *_each(_u64, "r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"),
    ]


class kvm_segment(Structure):
    _fields_ = [
        ("base", _u64),
        ("limit", _u32),
        ("selector", _u16),
        *_each(_u8, "type present dpl db s l g avl unusable padding"),
    ]


class kvm_dtable(Structure):
    _fields_ = [("base", _u64), ("limit", _u16), ("padding", _u16 * 3)]


class kvm_sregs(Structure):
    _fields_ = [
        *_each(kvm_segment, "cs ds es fs gs ss tr ldt"),
        *_each(kvm_dtable, "gdt idt"),
        *_each(_u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
        ("interrupt_bitmap", _u64 * 4),
    ]


class kvm_fpu(Structure):
    _fields_ = [
        ("fpr", _u8 * 16 * 8),
        *_each(_u16, "fcw fsw"),
        *_each(_u8, "ftwx pad1"),
        ("last_opcode", _u16),
        *_each(_u64, "last_ip last_dp"),
        ("xmm", _u8 * 16 * 16),
        *_each(_u32, "mxcsr pad2"),
    ]


class kvm_msr_entry(Structure):
    _fields_ = [("index", _u32), ("reserved", _u32), ("data", _u64)]


class kvm_msrs(Structure):
    """A header; ``nmsrs`` entries follow it."""

    _fields_ = [("nmsrs", _u32), ("pad", _u32), ("entries", kvm_msr_entry * 0)]


class kvm_cpuid_entry2(Structure):
    _fields_ = [
        *_each(_u32, "function index flags eax ebx ecx edx"),
        ("padding", _u32 * 3),
    ]


KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0


class kvm_cpuid2(Structure):
    """A header; ``nent`` entries follow it."""

    _fields_ = [("nent", _u32), ("padding", _u32), ("entries", kvm_cpuid_entry2 * 0)]


class kvm_coalesced_mmio_zone(Structure):
    """KVM_REGISTER_COALESCED_MMIO: where writes are gathered; ``pio`` says that it is a port."""

    _fields_ = [("addr", _u64), *_each(_u32, "size pio")]


class kvm_coalesced_mmio(Structure):  # one of them
    _fields_ = [("phys_addr", _u64), *_each(_u32, "len pio"), ("data", _u8 * 8)]


class kvm_coalesced_mmio_ring(Structure):
    """The ring's head; from ``first`` up to ``last``, not included, there are writes to take."""

    _fields_ = _each(_u32, "first last")


class kvm_translation(Structure):
    _fields_ = [
        *_each(_u64, "linear_address physical_address"),
        *_each(_u8, "valid writeable usermode"),
        ("pad", _u8 * 5),
    ]


class kvm_mp_state(Structure):
    _fields_ = [("mp_state", _u32)]


KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4

# --- struct kvm_run: the page shared with the kernel; its nested structures have no names in C --


class _run_hw(Structure):
    _fields_ = [("hardware_exit_reason", _u64)]


class _run_fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", _u64), ("cpu", _u32)]


class _run_io(Structure):
    _fields_ = [
        *_each(_u8, "direction size"),
        ("port", _u16),
        ("count", _u32),
        ("data_offset", _u64),
    ]


KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1


class _run_mmio(Structure):
    _fields_ = [("phys_addr", _u64), ("data", _u8 * 8), ("len", _u32), ("is_write", _u8)]


class _run_internal(Structure):
    _fields_ = [("suberror", _u32), ("ndata", _u32), ("data", _u64 * 16)]


class _run_emulation_failure(Structure):
    """Overlay of ``internal`` for KVM_INTERNAL_ERROR_EMULATION."""

    _fields_ = [
        *_each(_u32, "suberror ndata"),
        ("flags", _u64),
        ("insn_size", _u8),
        ("insn_bytes", _u8 * 15),
    ]


KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0


class _run_system_event(Structure):
    _fields_ = [("type", _u32), ("ndata", _u32), ("data", _u64 * 16)]


KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3


class _run_exit(ctypes.Union):
    _fields_ = [
        ("hw", _run_hw),
        ("fail_entry", _run_fail_entry),
        ("io", _run_io),
        ("mmio", _run_mmio),
        ("internal", _run_internal),
        ("emulation_failure", _run_emulation_failure),
        ("system_event", _run_system_event),
        ("padding", _u8 * 256),
    ]


class kvm_run(Structure):
    """The page that a vCPU fd maps; ``s``, the synchronised registers, is not used."""

    _anonymous_ = ("_exit",)
    _fields_ = [
        *_each(_u8, "request_interrupt_window immediate_exit"),
        ("padding1", _u8 * 6),
        ("exit_reason", _u32),
        *_each(_u8, "ready_for_interrupt_injection if_flag"),
        ("flags", _u16),
        *_each(_u64, "cr8 apic_base"),
        ("_exit", _run_exit),
        *_each(_u64, "kvm_valid_regs kvm_dirty_regs"),
        ("s", _u8 * 2048),
    ]


KVM_PIO_PAGE_OFFSET = 1  # the offset of port data, in pages from the start of kvm_run

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30

# --- Capabilities, for KVM_CHECK_EXTENSION -----------------------------------------------------

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_CLOCKSOURCE = 8
KVM_CAP_NR_MEMSLOTS = 10  # memory slots of one VM
KVM_CAP_MP_STATE = 14
KVM_CAP_COALESCED_MMIO = 15  # the offset of the ring, in pages from the start of kvm_run
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_INTERNAL_ERROR_DATA = 40
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_COALESCED_PIO = 162

KVM_API_VERSION = 12

# --- <asm/kvm_para.h>: the CPUID leaves through which a guest finds KVM ------------------------

KVM_CPUID_SIGNATURE = 0x4000_0000
KVM_CPUID_FEATURES = 0x4000_0001

# --- ioctls of /dev/kvm ------------------------------------------------------------------------

KVM_GET_API_VERSION = _IO(0x00)
KVM_CREATE_VM = _IO(0x01)
KVM_CHECK_EXTENSION = _IO(0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(0x04)
KVM_GET_SUPPORTED_CPUID = _IOWR(0x05, kvm_cpuid2)  # KVM_CAP_EXT_CPUID

# --- ioctls of a VM fd -------------------------------------------------------------------------

KVM_CREATE_VCPU = _IO(0x41)
KVM_SET_USER_MEMORY_REGION = _IOW(0x46, kvm_userspace_memory_region)  # KVM_CAP_USER_MEMORY
KVM_SET_TSS_ADDR = _IO(0x47)  # KVM_CAP_SET_TSS_ADDR
KVM_SET_IDENTITY_MAP_ADDR = _IOW(0x48, _u64)  # KVM_CAP_SET_IDENTITY_MAP_ADDR
KVM_CREATE_IRQCHIP = _IO(0x60)  # KVM_CAP_IRQCHIP
KVM_IRQ_LINE = _IOW(0x61, kvm_irq_level)  # KVM_CAP_IRQCHIP
KVM_REGISTER_COALESCED_MMIO = _IOW(0x67, kvm_coalesced_mmio_zone)  # KVM_CAP_COALESCED_PIO
KVM_UNREGISTER_COALESCED_MMIO = _IOW(0x68, kvm_coalesced_mmio_zone)
KVM_IRQFD = _IOW(0x76, kvm_irqfd)  # KVM_CAP_IRQFD
KVM_CREATE_PIT2 = _IOW(0x77, kvm_pit_config)  # KVM_CAP_PIT2
KVM_IOEVENTFD = _IOW(0x79, kvm_ioeventfd)  # KVM_CAP_IOEVENTFD

# --- ioctls of a vCPU fd -----------------------------------------------------------------------

KVM_RUN = _IO(0x80)
KVM_GET_REGS = _IOR(0x81, kvm_regs)
KVM_SET_REGS = _IOW(0x82, kvm_regs)
KVM_GET_SREGS = _IOR(0x83, kvm_sregs)
KVM_SET_SREGS = _IOW(0x84, kvm_sregs)
KVM_TRANSLATE = _IOWR(0x85, kvm_translation)
KVM_GET_MSRS = _IOWR(0x88, kvm_msrs)
KVM_SET_MSRS = _IOW(0x89, kvm_msrs)
KVM_GET_FPU = _IOR(0x8C, kvm_fpu)
KVM_SET_FPU = _IOW(0x8D, kvm_fpu)
KVM_SET_CPUID2 = _IOW(0x90, kvm_cpuid2)  # KVM_CAP_EXT_CPUID
KVM_GET_MP_STATE = _IOR(0x98, kvm_mp_state)  # KVM_CAP_MP_STATE
KVM_KVMCLOCK_CTRL = _IO(0xAD)  # KVM_CAP_KVMCLOCK_CTRL

IOCTL_NAMES = MappingProxyType(
    {value: name for name, value in list(globals().items()) if isinstance(value, Ioctl)}
)
"""The name of each ioctl declared above, for error messages."""
