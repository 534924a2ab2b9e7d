"""The numbers and structures of <linux/kvm.h> for saving a VM's state, as in ``abi.py``.

Apart from it because only a snapshot needs them, and the boot path does not.
``tests/kvm/test_abi.py`` checks them in the same way.
"""

from __future__ import annotations

import ctypes
from types import MappingProxyType

from pyvmm.kvm.abi import (
    _IO,
    _IOR,
    _IOW,
    _IOWR,
    Ioctl,
    Structure,
    _each,
    kvm_dtable,
    kvm_mp_state,
    kvm_segment,
)
from pyvmm.kvm.irqchip_abi import kvm_irqchip, kvm_lapic_state

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


class kvm_msr_list(Structure):
    """A header; ``nmsrs`` indices follow it."""

    _fields_ = [("nmsrs", _u32), ("indices", _u32 * 0)]


class kvm_sregs2(Structure):
    """As kvm_sregs, with PAE's page-directory pointers and without a pending interrupt."""

    _fields_ = [
        *_each(kvm_segment, "cs ds es fs gs ss tr ldt"),
        *_each(kvm_dtable, "gdt idt"),
        *_each(_u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base flags"),
        ("pdptrs", _u64 * 4),
    ]


class kvm_xsave(Structure):
    """The least; KVM_CAP_XSAVE2 says how many bytes it really has."""

    _fields_ = [("region", _u32 * 1024)]


class kvm_xcr(Structure):
    _fields_ = [*_each(_u32, "xcr reserved"), ("value", _u64)]


class kvm_xcrs(Structure):
    _fields_ = [*_each(_u32, "nr_xcrs flags"), ("xcrs", kvm_xcr * 16), ("padding", _u64 * 16)]


class kvm_debugregs(Structure):
    _fields_ = [("db", _u64 * 4), *_each(_u64, "dr6 dr7 flags"), ("reserved", _u64 * 9)]


class _events_exception(Structure):
    _fields_ = [*_each(_u8, "injected nr has_error_code pending"), ("error_code", _u32)]


class _events_interrupt(Structure):
    _fields_ = _each(_u8, "injected nr soft shadow")


class _events_nmi(Structure):
    _fields_ = _each(_u8, "injected pending masked pad")


class _events_smi(Structure):
    _fields_ = _each(_u8, "smm pending smm_inside_nmi latched_init")


class _events_triple_fault(Structure):
    _fields_ = [("pending", _u8)]


class kvm_vcpu_events(Structure):
    _fields_ = [
        ("exception", _events_exception),
        ("interrupt", _events_interrupt),
        ("nmi", _events_nmi),
        *_each(_u32, "sipi_vector flags"),
        ("smi", _events_smi),
        ("triple_fault", _events_triple_fault),
        ("reserved", _u8 * 26),
        ("exception_has_payload", _u8),
        ("exception_payload", _u64),
    ]


class kvm_pit_channel_state(Structure):
    _fields_ = [
        ("count", _u32),
        ("latched_count", _u16),
        *_each(_u8, "count_latched status_latched status read_state write_state write_latch"),
        *_each(_u8, "rw_mode mode bcd gate"),
        ("count_load_time", ctypes.c_int64),
    ]


class kvm_pit_state2(Structure):
    _fields_ = [
        ("channels", kvm_pit_channel_state * 3),
        ("flags", _u32),
        ("reserved", _u32 * 9),
    ]


class kvm_clock_data(Structure):
    _fields_ = [
        ("clock", _u64),
        *_each(_u32, "flags pad0"),
        *_each(_u64, "realtime host_tsc"),
        ("pad", _u32 * 4),
    ]


class kvm_device_attr(Structure):
    _fields_ = [*_each(_u32, "flags group"), *_each(_u64, "attr addr")]


KVM_VCPU_TSC_CTRL = 0  # the group of attributes of a vCPU that is about its TSC
KVM_VCPU_TSC_OFFSET = 0

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1

KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_SREGS2 = 200
KVM_CAP_XSAVE2 = 208

KVM_GET_MSR_INDEX_LIST = _IOWR(0x02, kvm_msr_list)  # of /dev/kvm

KVM_SET_IRQCHIP = _IOR(0x63, kvm_irqchip)  # as the kernel has it, though it only reads
KVM_SET_CLOCK = _IOW(0x7B, kvm_clock_data)  # KVM_CAP_ADJUST_CLOCK
KVM_GET_CLOCK = _IOR(0x7C, kvm_clock_data)
KVM_GET_PIT2 = _IOR(0x9F, kvm_pit_state2)  # KVM_CAP_PIT_STATE2
KVM_SET_PIT2 = _IOW(0xA0, kvm_pit_state2)

KVM_SET_LAPIC = _IOW(0x8F, kvm_lapic_state)  # KVM_CAP_IRQCHIP
KVM_SET_MP_STATE = _IOW(0x99, kvm_mp_state)  # KVM_CAP_MP_STATE
KVM_GET_VCPU_EVENTS = _IOR(0x9F, kvm_vcpu_events)  # KVM_CAP_VCPU_EVENTS
KVM_SET_VCPU_EVENTS = _IOW(0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = _IOR(0xA1, kvm_debugregs)  # KVM_CAP_DEBUGREGS
KVM_SET_DEBUGREGS = _IOW(0xA2, kvm_debugregs)
KVM_SET_TSC_KHZ = _IO(0xA2)  # KVM_CAP_TSC_CONTROL
KVM_GET_TSC_KHZ = _IO(0xA3)  # KVM_CAP_GET_TSC_KHZ
KVM_GET_XSAVE = _IOR(0xA4, kvm_xsave)  # KVM_CAP_XSAVE
KVM_SET_XSAVE = _IOW(0xA5, kvm_xsave)
KVM_GET_XCRS = _IOR(0xA6, kvm_xcrs)  # KVM_CAP_XCRS
KVM_SET_XCRS = _IOW(0xA7, kvm_xcrs)
KVM_GET_SREGS2 = _IOR(0xCC, kvm_sregs2)  # KVM_CAP_SREGS2
KVM_SET_SREGS2 = _IOW(0xCD, kvm_sregs2)
KVM_GET_XSAVE2 = _IOR(0xCF, kvm_xsave)  # KVM_CAP_XSAVE2
KVM_SET_DEVICE_ATTR = _IOW(0xE1, kvm_device_attr)  # KVM_CAP_VCPU_ATTRIBUTES
KVM_GET_DEVICE_ATTR = _IOW(0xE2, kvm_device_attr)

IOCTL_NAMES = MappingProxyType(
    {
        value: name
        for name, value in list(globals().items())
        if isinstance(value, Ioctl) and name.startswith("KVM_")
    }
)
"""The name of each, for errors."""
