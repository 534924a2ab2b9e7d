"""The numbers and structures of <linux/kvm.h> for reading the interrupt chips, as in ``abi.py``.

Apart from it because only a look at a halted guest (``nmi.py``) and a saved state need them.
``tests/kvm/test_abi.py`` checks them in the same way.
"""

from __future__ import annotations

import ctypes
from types import MappingProxyType

from pyvmm.kvm.abi import _IOR, _IOWR, Ioctl, Structure

_u32, _u64 = ctypes.c_uint32, ctypes.c_uint64

KVM_IRQCHIP_IOAPIC = 2
KVM_IOAPIC_NUM_PINS = 24


class kvm_ioapic_state(Structure):
    _fields_ = [
        ("base_address", _u64),
        ("ioregsel", _u32),
        ("id", _u32),
        ("irr", _u32),
        ("pad", _u32),
        ("redirtbl", _u64 * KVM_IOAPIC_NUM_PINS),
    ]


class _chip(Structure):
    """Only the IOAPIC of C's union of chips; ``_rest`` goes on to the union's size."""

    _fields_ = [
        ("ioapic", kvm_ioapic_state),
        ("_rest", ctypes.c_uint8 * (512 - ctypes.sizeof(kvm_ioapic_state))),
    ]


class kvm_irqchip(Structure):
    _fields_ = [("chip_id", _u32), ("pad", _u32), ("chip", _chip)]


class kvm_lapic_state(Structure):
    """The local APIC's register page, 16 bytes a register."""

    _fields_ = [("regs", ctypes.c_uint8 * 0x400)]


KVM_GET_IRQCHIP = _IOWR(0x62, kvm_irqchip)  # KVM_CAP_IRQCHIP
KVM_GET_LAPIC = _IOR(0x8E, kvm_lapic_state)  # KVM_CAP_IRQCHIP

IOCTL_NAMES = MappingProxyType(
    {value: name for name, value in list(globals().items()) if isinstance(value, Ioctl)}
)
"""The name of each, for errors."""
