"""The numbers and structures of <linux/kvm.h> for saving a VM's state, as in ``abi.py``.

Apart from it because only a snapshot needs them, and the boot path does not.
``tests/kvm/test_abi.py`` checks them in the same way.

Of a structure that is saved as the bytes that KVM gave only the size is here, as a part of its
ioctls' numbers: making a class for each took a restore 0.3 ms.
"""

from __future__ import annotations

import ctypes
from types import MappingProxyType

from pyvmm.kvm.abi import (
    _IO,
    _IOR,
    _IOW,
    _IOWR,
    _READ,
    _WRITE,
    Ioctl,
    Structure,
    _each,
    _ioc,
    kvm_dtable,
    kvm_mp_state,
    kvm_segment,
)
from pyvmm.kvm.irqchip_abi import kvm_irqchip, kvm_lapic_state

_u32, _u64 = ctypes.c_uint32, ctypes.c_uint64


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

_PIT2_BYTES = 112  # struct kvm_pit_state2
_EVENTS_BYTES = 64  # struct kvm_vcpu_events
_DEBUGREGS_BYTES = 128  # struct kvm_debugregs
_XSAVE_BYTES = 4096  # struct kvm_xsave, at least: KVM_CAP_XSAVE2 says how many it really has
_XCRS_BYTES = 392  # struct kvm_xcrs

KVM_GET_MSR_INDEX_LIST = _IOWR(0x02, kvm_msr_list)  # of /dev/kvm

KVM_SET_IRQCHIP = _IOR(0x63, kvm_irqchip)  # as the kernel has it, though it only reads
KVM_SET_CLOCK = _IOW(0x7B, kvm_clock_data)  # KVM_CAP_ADJUST_CLOCK
KVM_GET_CLOCK = _IOR(0x7C, kvm_clock_data)
KVM_GET_PIT2 = _ioc(_READ, 0x9F, _PIT2_BYTES)  # KVM_CAP_PIT_STATE2
KVM_SET_PIT2 = _ioc(_WRITE, 0xA0, _PIT2_BYTES)

KVM_SET_LAPIC = _IOW(0x8F, kvm_lapic_state)  # KVM_CAP_IRQCHIP
KVM_SET_MP_STATE = _IOW(0x99, kvm_mp_state)  # KVM_CAP_MP_STATE
KVM_GET_VCPU_EVENTS = _ioc(_READ, 0x9F, _EVENTS_BYTES)  # KVM_CAP_VCPU_EVENTS
KVM_SET_VCPU_EVENTS = _ioc(_WRITE, 0xA0, _EVENTS_BYTES)
KVM_GET_DEBUGREGS = _ioc(_READ, 0xA1, _DEBUGREGS_BYTES)  # KVM_CAP_DEBUGREGS
KVM_SET_DEBUGREGS = _ioc(_WRITE, 0xA2, _DEBUGREGS_BYTES)
KVM_SET_TSC_KHZ = _IO(0xA2)  # KVM_CAP_TSC_CONTROL
KVM_GET_TSC_KHZ = _IO(0xA3)  # KVM_CAP_GET_TSC_KHZ
KVM_GET_XSAVE = _ioc(_READ, 0xA4, _XSAVE_BYTES)  # KVM_CAP_XSAVE
KVM_SET_XSAVE = _ioc(_WRITE, 0xA5, _XSAVE_BYTES)
KVM_GET_XCRS = _ioc(_READ, 0xA6, _XCRS_BYTES)  # KVM_CAP_XCRS
KVM_SET_XCRS = _ioc(_WRITE, 0xA7, _XCRS_BYTES)
KVM_GET_SREGS2 = _IOR(0xCC, kvm_sregs2)  # KVM_CAP_SREGS2
KVM_SET_SREGS2 = _IOW(0xCD, kvm_sregs2)
KVM_GET_XSAVE2 = _ioc(_READ, 0xCF, _XSAVE_BYTES)  # KVM_CAP_XSAVE2
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
