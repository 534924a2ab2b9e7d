"""The time stamp counters of a VM's vCPUs, together, and with kvm-clock.

Linux compares its clocks with each other, and gives one up that is some 100 us off.  So kvm-clock
and the TSC are read at one moment for a save, and set to agree like that for a restore.

A vCPU's TSC is the host's, scaled, plus an offset.  Linux compares the TSCs of its CPUs, so that
they must be exactly as far apart after a restore as they were before.  Values that were read one
vCPU after another say that only to some microseconds; the offsets say it exactly.

On a host whose KVM does not have them (before Linux 5.16) it is KVM that gives each vCPU the TSC of
the one before, if it is told a value within a second of that.  A KVM without TSC offsets in its
hardware shows the guest the host's own TSC: all offsets are 0 then, and nothing can be set.
"""

from __future__ import annotations

import ctypes
import errno

from pyvmm.errors import KvmError
from pyvmm.kvm import state_abi
from pyvmm.kvm.ioctl import ioctl
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.kvm.handles import Vcpu, Vm

TSC, TSC_DEADLINE = 0x10, 0x6E0
"""MSRs."""
_MASK = (1 << 64) - 1
_TRIES = 5


def offset_of(vcpu: Vcpu) -> int | None:
    """Return the offset of the vCPU's TSC to the host's, None if KVM does not say; KvmError."""
    value = ctypes.c_uint64()
    try:
        ioctl(vcpu.fd, state_abi.KVM_GET_DEVICE_ATTR, _attribute(value))
    except KvmError as error:
        if error.errno in (errno.ENXIO, errno.ENOTTY, errno.EINVAL):
            return None
        raise
    return value.value


def sample(vm: Vm, vcpu: Vcpu) -> tuple[int, int]:
    """Return kvm-clock, in ns, and the TSC of ``vcpu`` at one moment: the best of some tries."""
    found: list[tuple[int, int, int]] = []
    for _ in range(_TRIES):
        before = vcpu.get_msrs([TSC])[TSC]
        clock = state_abi.kvm_clock_data()
        ioctl(vm.fd, state_abi.KVM_GET_CLOCK, clock)
        took = vcpu.get_msrs([TSC])[TSC] - before
        found.append((took, clock.clock, before + took // 2))
    _, clock_ns, tsc = min(found)
    return clock_ns, tsc & _MASK


def lag(vm: Vm, vcpu: Vcpu, saved: tuple[int, int]) -> int:
    """Return the ticks by which the TSC is behind kvm-clock since ``saved``, a ``sample``."""
    saved_ns, saved_tsc = saved
    clock_ns, tsc = sample(vm, vcpu)
    khz = ioctl(vcpu.fd, state_abi.KVM_GET_TSC_KHZ)
    return saved_tsc + ticks(khz, clock_ns - saved_ns) - tsc


def align(vcpus: Mapping[Vcpu, object], forward: int = 0) -> None:
    """Set the TSCs of ``vcpus`` as far from that of the first as they were; KvmError.

    The first one's goes ``forward`` by so many ticks.  The values are the states that the vCPUs
    have taken.  Nothing happens if an offset is not known, here or where the states were saved.  A
    timer that waits for a TSC is set again.
    """
    saved = [_saved_offset(state) for state in vcpus.values()]
    first, base = saved[0], offset_of(next(iter(vcpus)))
    if base is None or first is None:
        return
    for vcpu, offset_then in zip(vcpus, saved, strict=True):
        if offset_then is None:
            return
        # For the first one too: KVM takes vCPUs for synchronised if their offsets were set so.
        offset = ctypes.c_uint64(base + forward + offset_then - first & _MASK)
        ioctl(vcpu.fd, state_abi.KVM_SET_DEVICE_ATTR, _attribute(offset))
        deadline = vcpu.get_msrs([TSC_DEADLINE])
        if deadline.get(TSC_DEADLINE):
            vcpu.set_msrs(deadline)


def ticks(khz: int, duration_ns: int) -> int:
    """Return by how much a TSC of ``khz`` counts on in ``duration_ns`` nanoseconds."""
    return khz * duration_ns // 1_000_000


def _saved_offset(state: object) -> int | None:
    assert isinstance(state, dict)  # the vCPU has taken it, so it is right
    offset: int | None = state["tsc_offset"]
    return offset


def _attribute(value: ctypes.c_uint64) -> state_abi.kvm_device_attr:
    return state_abi.kvm_device_attr(
        group=state_abi.KVM_VCPU_TSC_CTRL, attr=state_abi.KVM_VCPU_TSC_OFFSET,
        addr=ctypes.addressof(value),
    )
