"""Save and restore KVM's parts of a paused machine: a vCPU, the chips in the kernel, kvm-clock.

``Vcpu.save``, ``Vm.save`` and their ``restore`` lead here.  A structure is saved as the bytes that
KVM gave.  KVM checks them itself when it takes them back, and a refusal is a StateError.

The order of the ioctls matters; it is Firecracker's.  A vCPU is saved only after KVM_RUN was
interrupted: until then KVM may owe it the end of a port or memory access.  Everything is restored
before any vCPU runs: first the vCPUs in their order, then their TSCs together (``tsc.py``), then
the VM.

Two saves of one state differ only in clocks that go on: among the MSRs the TSC and Hyper-V's two,
and besides kvm-clock, a running local APIC timer, and the load times of the PIT.

Line levels and eventfds are in no saved state: whoever restores a machine drives the lines and
rings the doorbells again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import struct

from pyvmm.errors import HostError, KvmError, StateError
from pyvmm.kvm import abi, irqchip_abi, state_abi, tsc
from pyvmm.kvm.ioctl import ioctl, msr_buffer
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.state import Fields

if TYPE_CHECKING:
    from pyvmm.kvm.handles import Kvm, Vcpu, Vm

LAST_MSRS = (tsc.TSC, tsc.TSC_DEADLINE)
"""Restored in this order, after all others: KVM compares a deadline with the TSC at once."""
_FAR_TICKS, _MASK = 1 << 43, (1 << 64) - 1
"""Much more than a second of any TSC."""
_UNLISTED_MSRS = (
    *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF,
)  # fmt: skip
"""The MTRRs: KVM gives and takes them, but KVM_GET_MSR_INDEX_LIST does not have them."""
_EMULATED_CPU = struct.pack("=4I", 1, 0, 0, 0x60FB1)
"""The head of CPUID's leaf 1 for QEMU's own processor, which QEMU emulates, as in the lab."""
_TSS_BUSY = 2  # of a segment's type
_MSRS_AT_ONCE = 256  # the kernel's MAX_IO_MSRS
_MOST_MSRS = 4096
_MOST_ACCESSES = 1 << 16
"""Exits by which one instruction of the guest may still be completed."""
_MOST_XSAVE_BYTES = 1 << 16
_TOLERANCE_PPM = 250  # the kernel's tsc_tolerance_ppm: no scaling below that

_CHIPS = {
    "pic_master": state_abi.KVM_IRQCHIP_PIC_MASTER,
    "pic_slave": state_abi.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": irqchip_abi.KVM_IRQCHIP_IOAPIC,
}
_CHIP_BYTES = ctypes.sizeof(irqchip_abi.kvm_irqchip)


def save_vcpu(vcpu: Vcpu) -> dict[str, object]:
    """Return the state of ``vcpu``.  KvmError; HostError if its /dev/kvm is not open any more."""
    if vcpu.kvm is None or vcpu.kvm.fd < 0:
        raise HostError("a vCPU is saved only while the /dev/kvm that made it is open")
    kvm, fd = vcpu.kvm, vcpu.fd
    # Before everything else: in KVM an INIT or SIPI that waits happens now.
    state: dict[str, object] = {"mp_state": vcpu.get_mp_state()}
    state["regs"] = _get(fd, abi.KVM_GET_REGS)
    # sregs2 has PAE's page-directory pointers besides.
    has_sregs2 = kvm.check_extension(state_abi.KVM_CAP_SREGS2)
    state["sregs"] = None if has_sregs2 else _get(fd, abi.KVM_GET_SREGS)
    state["sregs2"] = _get(fd, state_abi.KVM_GET_SREGS2) if has_sregs2 else None
    if size := kvm.check_extension(state_abi.KVM_CAP_XSAVE2):
        state["xsave"] = _get(fd, state_abi.KVM_GET_XSAVE2, size)
    else:
        state["xsave"] = _get(fd, state_abi.KVM_GET_XSAVE)
    has_xcrs = kvm.check_extension(state_abi.KVM_CAP_XCRS)
    state["xcrs"] = _get(fd, state_abi.KVM_GET_XCRS) if has_xcrs else None
    state["debugregs"] = _get(fd, state_abi.KVM_GET_DEBUGREGS)
    state["lapic"] = _get_unless(fd, irqchip_abi.KVM_GET_LAPIC, errno.EINVAL)
    state["tsc_khz"] = tsc_khz_of(vcpu, kvm)
    state["tsc_offset"] = tsc.offset_of(vcpu)
    state["msrs"] = [[index, value] for index, value in _get_msrs(vcpu, _msr_indices(kvm)).items()]
    state["events"] = _get(fd, state_abi.KVM_GET_VCPU_EVENTS)  # last: all others may change it
    return state


def forget_vcpu(vcpu: Vcpu) -> None:
    """Drop what a vCPU that has run keeps in KVM, and no ``restore_vcpu`` replaces; KvmError."""
    vcpu.get_mp_state()  # an INIT or SIPI that waits happens now, and not after the restore
    # A local APIC that is restored starts its timer with the deadline of before.
    with contextlib.suppress(KvmError):  # a KVM without the MSR has no such timer
        vcpu.set_msrs({tsc.TSC_DEADLINE: 0})


def settle_vcpu(vcpu: Vcpu) -> None:
    """Complete the access of a vCPU's last exit; KvmError if it does not end.

    An access that KVM_RUN left to user space is completed by the next KVM_RUN, which would put its
    result into a state that was restored meanwhile.  With an exit requested, KVM_RUN does that
    before it enters the guest, and does not enter.
    """
    vcpu.request_exit()
    for _ in range(_MOST_ACCESSES):
        try:
            vcpu.run()
        except InterruptedError:
            break
        except BlockingIOError:
            continue
    else:
        raise KvmError("KVM_RUN", errno.EBUSY, "an access of the guest does not end")
    vcpu.clear_exit_request()


def restore_vcpu(vcpu: Vcpu, data: object, advance_ns: int = 0) -> None:
    """Give ``vcpu`` the state that ``save_vcpu`` returned; StateError.

    Its TSC counts on from the moment of the save, or ``advance_ns`` after it.  ``tsc.align`` comes
    once all vCPUs are restored.
    """
    fields = Fields(f"vcpu{vcpu.index}", data)
    tsc_khz = fields.optional_integer("tsc_khz", 1, (1 << 31) - 1)
    mp_state = fields.integer("mp_state", 0, abi.KVM_MP_STATE_SIPI_RECEIVED)
    regs = fields.octets("regs", *_exactly(abi.KVM_SET_REGS))
    sregs = fields.optional_octets("sregs", _size(abi.KVM_SET_SREGS))
    sregs2 = fields.optional_octets("sregs2", _size(state_abi.KVM_SET_SREGS2))
    if (sregs is None) == (sregs2 is None):
        raise fields.error("sregs", "and sregs2: exactly one must be there")
    least = _size(state_abi.KVM_SET_XSAVE)
    needed = vcpu.kvm.check_extension(state_abi.KVM_CAP_XSAVE2) if vcpu.kvm else 0
    xsave = fields.octets("xsave", max(least, needed), max(least, needed, _MOST_XSAVE_BYTES))
    xcrs = fields.optional_octets("xcrs", _size(state_abi.KVM_SET_XCRS))
    debugregs = fields.octets("debugregs", *_exactly(state_abi.KVM_SET_DEBUGREGS))
    lapic = fields.optional_octets("lapic", _size(state_abi.KVM_SET_LAPIC))
    msrs = dict(fields.pairs("msrs", _MOST_MSRS, ((1 << 32) - 1, (1 << 64) - 1)))
    fields.optional_integer("tsc_offset", 0, _MASK)
    events = fields.octets("events", *_exactly(state_abi.KVM_SET_VCPU_EVENTS))
    fields.end()
    if advance_ns and tsc_khz is not None and tsc.TSC in msrs:
        msrs[tsc.TSC] = msrs[tsc.TSC] + tsc.ticks(tsc_khz, advance_ns) & _MASK
    _match(fields, "lapic", lapic, _get_unless(vcpu.fd, irqchip_abi.KVM_GET_LAPIC, errno.EINVAL))
    if vcpu.kvm is not None:
        has_xcrs = vcpu.kvm.check_extension(state_abi.KVM_CAP_XCRS)
        _match(fields, "xcrs", xcrs, _get(vcpu.fd, state_abi.KVM_GET_XCRS) if has_xcrs else None)

    put = _Putter(vcpu.fd, fields)
    if tsc_khz is not None:
        _set_tsc_khz(vcpu, tsc_khz, fields)
    put("mp_state", state_abi.KVM_SET_MP_STATE, bytes(abi.kvm_mp_state(mp_state=mp_state)))
    put("regs", abi.KVM_SET_REGS, regs)  # before events: it drops a pending exception
    if sregs2 is not None:  # before lapic: it has the APIC's base
        put("sregs2", state_abi.KVM_SET_SREGS2, _as_emulated(vcpu, sregs2))
        _set_cr8(vcpu, state_abi.kvm_sregs2.from_buffer_copy(sregs2).cr8)
    elif sregs is not None:
        put("sregs", abi.KVM_SET_SREGS, _as_emulated(vcpu, sregs))
        _set_cr8(vcpu, abi.kvm_sregs.from_buffer_copy(sregs).cr8)
    if xcrs is not None:  # before xsave: it says which parts of that are there
        put("xcrs", state_abi.KVM_SET_XCRS, xcrs)
    put("xsave", state_abi.KVM_SET_XSAVE, xsave)
    put("debugregs", state_abi.KVM_SET_DEBUGREGS, debugregs)
    if lapic is not None:  # before the MSRs: without it a TSC_DEADLINE is lost silently
        put("lapic", state_abi.KVM_SET_LAPIC, lapic)
    if vcpu.index == 0 and tsc.TSC in msrs:
        # A TSC within a second of KVM's own counts as an attempt to synchronise vCPUs, and KVM
        # keeps its own: Linux before 6.7 does so even for a VM's first write.  So lead it away.
        _set_msrs(vcpu, {tsc.TSC: (msrs[tsc.TSC] + _FAR_TICKS) & _MASK}, fields)
    _set_msrs(vcpu, msrs, fields)
    put("events", state_abi.KVM_SET_VCPU_EVENTS, events)


def tsc_khz_of(vcpu: Vcpu, kvm: Kvm) -> int | None:
    """Return the rate of the vCPU's TSC in kHz; None if KVM does not tell."""
    if not kvm.check_extension(state_abi.KVM_CAP_GET_TSC_KHZ):
        return None
    return ioctl(vcpu.fd, state_abi.KVM_GET_TSC_KHZ)


def save_vm(vm: Vm) -> dict[str, object]:
    """Return the state of the chips in the kernel, None for those that are not there; KvmError."""
    state: dict[str, object] = {}
    for name, chip in _CHIPS.items():
        asked = bytes(irqchip_abi.kvm_irqchip(chip_id=chip))
        state[name] = _get_unless(vm.fd, irqchip_abi.KVM_GET_IRQCHIP, errno.ENXIO, asked)
    state["pit2"] = _get_unless(vm.fd, state_abi.KVM_GET_PIT2, errno.ENXIO)
    state["clock"] = _get(vm.fd, state_abi.KVM_GET_CLOCK)
    return state


def restore_vm(vm: Vm, data: object, advance_ns: int = 0) -> None:
    """Give the chips the state that ``save_vm`` returned; StateError.

    kvm-clock goes on from the moment of the save: the time between has not passed for the guest, or
    only ``advance_ns`` of it.
    """
    fields = Fields("chips", data)
    chips = {name: fields.optional_octets(name, _CHIP_BYTES) for name in _CHIPS}
    for name, chip in chips.items():
        if chip and irqchip_abi.kvm_irqchip.from_buffer_copy(chip).chip_id != _CHIPS[name]:
            raise fields.error(name, f"is another chip than number {_CHIPS[name]}")
    pit2 = fields.optional_octets("pit2", _size(state_abi.KVM_SET_PIT2))
    clock = state_abi.kvm_clock_data.from_buffer_copy(
        fields.octets("clock", *_exactly(state_abi.KVM_SET_CLOCK))
    )
    fields.end()
    for name, number in _CHIPS.items():
        asked = bytes(irqchip_abi.kvm_irqchip(chip_id=number))
        here = _get_unless(vm.fd, irqchip_abi.KVM_GET_IRQCHIP, errno.ENXIO, asked)
        _match(fields, name, chips[name], here)
    _match(fields, "pit2", pit2, _get_unless(vm.fd, state_abi.KVM_GET_PIT2, errno.ENXIO))
    # KVM_CLOCK_REALTIME would have KVM add the time that has passed.  The caller does so by the
    # same clock, because not every KVM can, and the TSC must have the same time added.
    clock.flags = 0
    clock.clock = clock.clock + advance_ns & _MASK

    put = _Putter(vm.fd, fields)
    if pit2 is not None:
        put("pit2", state_abi.KVM_SET_PIT2, pit2)
    put("clock", state_abi.KVM_SET_CLOCK, bytes(clock))
    for name, chip in chips.items():
        if chip is not None:
            put(name, state_abi.KVM_SET_IRQCHIP, chip)


class _Putter:
    """Gives KVM a field's bytes; StateError names the field that KVM refuses."""

    def __init__(self, fd: int, fields: Fields) -> None:
        self._fd = fd
        self._fields = fields

    def __call__(self, name: str, request: abi.Ioctl, data: bytes) -> None:
        try:
            ioctl(self._fd, request, bytearray(data))
        except KvmError as error:
            raise _refused(self._fields, name, error) from error


def _match(fields: Fields, name: str, saved: bytes | None, here: bytes | None) -> None:
    """StateError unless the part ``name`` is both in the state and in this machine, or in neither.

    A part that is in one of them only would go on with what it had.
    """
    if (saved is None) != (here is None):
        raise fields.error(name, "is missing" if saved is None else "is no part of this machine")


def _refused(fields: Fields, name: str, error: KvmError) -> StateError:
    return fields.error(name, f"is refused by KVM: {error}")


def _size(request: abi.Ioctl) -> int:
    """Return the bytes of the structure that ``request`` takes: <asm-generic/ioctl.h>."""
    return request >> 16 & 0x3FFF


def _exactly(request: abi.Ioctl) -> tuple[int, int]:
    return _size(request), _size(request)


def _get(fd: int, request: abi.Ioctl, size: int = 0) -> bytes:
    data = bytearray(max(size, _size(request)))
    ioctl(fd, request, data)
    return bytes(data)


def _get_unless(fd: int, request: abi.Ioctl, absent: int, asked: bytes = b"") -> bytes | None:
    """Return what KVM writes over ``asked``, or None if it refuses with the errno ``absent``."""
    data = bytearray(asked or _size(request))
    try:
        ioctl(fd, request, data)
    except KvmError as error:
        if error.errno == absent:
            return None
        raise
    return bytes(data)


def _as_emulated(vcpu: Vcpu, sregs: bytes) -> bytes:
    """Return ``sregs``, of either kind, as QEMU's emulated SVM needs them; elsewhere unchanged.

    KVM always tells a busy TSS (type 11).  QEMU's I/O permission check knows only one that is
    available (type 9), as its own LTR leaves it: a program's IN or OUT would be SIGSEGV.
    """
    if _EMULATED_CPU not in vcpu.cpuid:
        return sregs
    changed = bytearray(sregs)
    at = abi.kvm_sregs.tr.offset + abi.kvm_segment.type.offset
    changed[at] &= ~_TSS_BUSY
    return bytes(changed)


def _set_cr8(vcpu: Vcpu, cr8: int) -> None:
    """Without a local APIC in the kernel, KVM_RUN takes CR8 from the run page."""
    vcpu.page.set_int(abi.kvm_run.cr8.offset, 8, cr8)


def _set_tsc_khz(vcpu: Vcpu, khz: int, fields: Fields) -> None:
    """Have the vCPU's TSC count ``khz``, if it does not already."""
    try:
        now = ioctl(vcpu.fd, state_abi.KVM_GET_TSC_KHZ)
        if abs(now - khz) * 1_000_000 > khz * _TOLERANCE_PPM:
            ioctl(vcpu.fd, state_abi.KVM_SET_TSC_KHZ, khz)
    except KvmError as error:
        raise _refused(fields, "tsc_khz", error) from error


def _msr_indices(kvm: Kvm) -> list[int]:
    """Return the indices of all MSRs that a vCPU of ``kvm`` may have a state in."""
    count = 0
    while True:
        data = bytearray(bytes(state_abi.kvm_msr_list(nmsrs=count)) + bytes(4 * count))
        try:
            ioctl(kvm.fd, state_abi.KVM_GET_MSR_INDEX_LIST, data)
            break
        except KvmError as error:
            if error.errno != errno.E2BIG or count:
                raise
            count = min(state_abi.kvm_msr_list.from_buffer_copy(data).nmsrs, _MOST_MSRS)
    listed = memoryview(data)[4:].cast("I").tolist()
    return list(dict.fromkeys((*listed, *_UNLISTED_MSRS)))


def _get_msrs(vcpu: Vcpu, indices: list[int]) -> dict[int, int]:
    """Return the values by index, without the MSRs of which KVM gives none."""
    found: dict[int, int] = {}
    while indices:
        some = indices[:_MSRS_AT_ONCE]
        values = vcpu.get_msrs(some)
        found |= values
        # KVM stops at an MSR that it refuses: go on behind it.
        indices = indices[len(values) + (len(values) < len(some)) :]
    return found


def _set_msrs(vcpu: Vcpu, msrs: dict[int, int], fields: Fields) -> None:
    """Set ``msrs``; StateError names one that KVM refuses, unless it has that value already.

    KVM refuses any value for some, such as ASYNC_PF_INT of a vCPU without a local APIC.
    """
    left = [index for index in msrs if index not in LAST_MSRS]
    left += [index for index in LAST_MSRS if index in msrs]
    while left:
        some = left[:_MSRS_AT_ONCE]
        try:
            done = ioctl(vcpu.fd, abi.KVM_SET_MSRS, msr_buffer({i: msrs[i] for i in some}))
            if done < len(some):
                refused, done = some[done], done + 1
                if vcpu.get_msrs([refused]) != {refused: msrs[refused]}:
                    raise fields.error("msrs", f"is refused by KVM: MSR {refused:#x}")
        except KvmError as error:
            raise _refused(fields, "msrs", error) from error
        left = left[done:]
