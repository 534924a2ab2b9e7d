"""Tell if something can wake a vCPU that halts with interrupts off: an NMI, SMI or INIT.

With every vCPU halted none sends an IPI.  Two sources are left.  A line of the IOAPIC may be of
such a kind.  And the PIT: KVM lets its ticks go to LINT0 of every local APIC, which may make them
NMIs.

Three cannot wake it.  Nothing drives LINT1, which Linux leaves as an NMI on its boot CPU.  A local
APIC's timer has no delivery mode.  Performance counters stand still in a halted guest.
"""

from __future__ import annotations

import sys

from pyvmm.kvm import irqchip_abi as abi
from pyvmm.kvm.ioctl import ioctl

_MASKED = 1 << 16
_MODE_SHIFT, _MODE_MASK = 8, 7
_SMI, _NMI, _INIT = 2, 4, 5
"""Delivery modes.  Fixed, lowest priority and ExtINT are interrupts, which wait for IF."""
_LVT_LINT0 = 0x350


def ioapic_can_wake(vm_fd: int) -> bool:
    """True if the IOAPIC has an unmasked entry that is NMI, SMI or INIT.  KvmError."""
    state = abi.kvm_irqchip(chip_id=abi.KVM_IRQCHIP_IOAPIC)
    ioctl(vm_fd, abi.KVM_GET_IRQCHIP, state)
    return any(_can_wake(entry) for entry in state.chip.ioapic.redirtbl)


def pit_can_wake(vcpu_fd: int) -> bool:
    """True if the PIT's ticks are NMIs for this vCPU; in its own thread.  KvmError."""
    state = abi.kvm_lapic_state()
    ioctl(vcpu_fd, abi.KVM_GET_LAPIC, state)
    return _can_wake(int.from_bytes(state.regs[_LVT_LINT0 : _LVT_LINT0 + 4], sys.byteorder))


def _can_wake(entry: int) -> bool:
    return not entry & _MASKED and entry >> _MODE_SHIFT & _MODE_MASK in (_SMI, _NMI, _INIT)
