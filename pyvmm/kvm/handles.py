"""``Kvm``, ``Vm`` and ``Vcpu``: one object for each kind of KVM fd, closed by it alone.

A failing ioctl is a ``KvmError`` that names it.  Closing is idempotent, and a closed handle's
``fd`` is -1, so that using it is EBADF and never an ioctl on somebody else's file.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import sys
from collections.abc import Iterable, Mapping
from types import TracebackType

from pyvmm.errors import HostError, KvmError
from pyvmm.kvm import abi, cpuid_entry
from pyvmm.kvm.cpuid_entry import CpuidEntry
from pyvmm.kvm.exits import CoalescedRing, RunPage
from pyvmm.kvm.ioctl import MSR_ENTRY, MSR_HEAD, ioctl, msr_buffer, vcpu_entry
from pyvmm.kvm.nmi import ioapic_can_wake, pit_can_wake

DEFAULT_PATH = "/dev/kvm"
_MAX_CPUID_ENTRIES = 4096


class _Handle:
    """An fd and its one owner."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the fd; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Kvm(_Handle):
    """``/dev/kvm``: KvmError if it cannot be opened, HostError if it is not API version 12."""

    __slots__ = ("api_version",)

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise KvmError(
                f"open {path}", error.errno or errno.EIO, "pyvmm doctor says what to do"
            ) from error
        try:
            self.api_version = ioctl(self.fd, abi.KVM_GET_API_VERSION)
            if self.api_version != abi.KVM_API_VERSION:
                raise HostError(
                    f"{path}: KVM API version {self.api_version}, not {abi.KVM_API_VERSION}"
                )
        except HostError:
            self.close()
            raise

    def __enter__(self) -> Kvm:
        return self

    def check_extension(self, capability: int) -> int:
        """Return KVM's answer for a ``KVM_CAP_*``: 0 if it lacks it, else 1 or a capability's
        number."""
        return ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability)

    @property
    def vcpu_mmap_size(self) -> int:
        """Bytes of a vCPU's mapping: the run page and the pages behind it."""
        return ioctl(self.fd, abi.KVM_GET_VCPU_MMAP_SIZE)

    @property
    def ring_page(self) -> int:
        """The page of gathered port writes, counted from kvm_run's; 0 if there is none."""
        if not self.check_extension(abi.KVM_CAP_COALESCED_PIO):
            return 0
        return self.check_extension(abi.KVM_CAP_COALESCED_MMIO)

    def supported_cpuid(self) -> list[CpuidEntry]:
        """Return the CPUID that this host can give a guest; KVM leaves the hypervisor bit clear."""
        return cpuid_entry.unpack(self.packed_cpuid())

    def packed_cpuid(self) -> bytearray:
        """Return ``supported_cpuid`` as ``struct kvm_cpuid2`` has it."""
        count = 256
        while True:
            buffer = cpuid_entry.room_for(count)
            try:
                ioctl(self.fd, abi.KVM_GET_SUPPORTED_CPUID, buffer)
                return cpuid_entry.cut(buffer)
            except KvmError as error:
                if error.errno != errno.E2BIG or count >= _MAX_CPUID_ENTRIES:
                    raise
                count *= 2

    def create_vm(self) -> Vm:
        """Return a VM with no memory and no vCPU.  It outlives this handle, but for ``save``."""
        return Vm(ioctl(self.fd, abi.KVM_CREATE_VM), self.vcpu_mmap_size, self)


class Vm(_Handle):
    """One virtual machine: its memory slots, interrupt chips and vCPUs."""

    __slots__ = ("_kvm", "_mmap_bytes")

    def __init__(self, fd: int, mmap_bytes: int, kvm: Kvm | None = None) -> None:
        super().__init__(fd)
        self._mmap_bytes = mmap_bytes
        self._kvm = kvm

    def __enter__(self) -> Vm:
        return self

    def set_user_memory_region(
        self,
        slot: int,
        gpa: int,
        size_bytes: int,
        host_address: int,
        *,
        read_only: bool = False,
    ) -> None:
        """Map ``size_bytes`` of this process's memory at ``gpa``; size 0 removes the slot.

        With ``read_only`` guest reads see the memory and guest writes are MMIO exits.  The
        caller keeps the memory mapped as long as the VM lives.
        """
        region = abi.kvm_userspace_memory_region(
            slot=slot,
            flags=abi.KVM_MEM_READONLY if read_only else 0,
            guest_phys_addr=gpa,
            memory_size=size_bytes,
            userspace_addr=host_address,
        )
        ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, region)

    def create_irqchip(self) -> None:
        """Create the 8259 pair, the IOAPIC and, for vCPUs made afterwards, local APICs in the
        kernel."""
        ioctl(self.fd, abi.KVM_CREATE_IRQCHIP)

    def create_pit2(self) -> None:
        """Create the 8254 in the kernel, with port 0x61, on which TSC calibration spins."""
        ioctl(self.fd, abi.KVM_CREATE_PIT2, abi.kvm_pit_config(flags=abi.KVM_PIT_SPEAKER_DUMMY))

    def set_tss_addr(self, gpa: int) -> None:
        """Give Intel's real-mode emulation three pages below 4 GiB."""
        ioctl(self.fd, abi.KVM_SET_TSS_ADDR, gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """Give Intel's real-mode emulation one page; before the first vCPU."""
        ioctl(
            self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, bytearray(gpa.to_bytes(8, sys.byteorder))
        )

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set the level of interrupt line ``gsi``."""
        ioctl(self.fd, abi.KVM_IRQ_LINE, abi.kvm_irq_level(irq=gsi, level=int(level)))

    def irqfd(self, fd: int, gsi: int, *, deassign: bool = False) -> None:
        """Pulse ``gsi`` in the kernel whenever eventfd ``fd`` is written (an edge)."""
        flags = abi.KVM_IRQFD_FLAG_DEASSIGN if deassign else 0
        ioctl(self.fd, abi.KVM_IRQFD, abi.kvm_irqfd(fd=fd, gsi=gsi, flags=flags))

    def ioeventfd(
        self,
        fd: int,
        address: int,
        length: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """Signal eventfd ``fd`` when the guest writes ``length`` bytes at ``address``.

        Such a write makes no exit.  With ``datamatch`` only that value counts; ``pio`` means
        ``address`` is a port.
        """
        flags = abi.KVM_IOEVENTFD_FLAG_PIO if pio else 0
        if datamatch is not None:
            flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        if deassign:
            flags |= abi.KVM_IOEVENTFD_FLAG_DEASSIGN
        request = abi.kvm_ioeventfd(
            datamatch=datamatch or 0, addr=address, len=length, fd=fd, flags=flags
        )
        ioctl(self.fd, abi.KVM_IOEVENTFD, request)

    def gather_port(self, port: int, on: bool) -> None:
        """Gather one-byte writes to ``port`` in ``Vcpu.coalesced_ring``: they then make no exits.

        With ``on`` false, stop.  Once this returns, all gathered writes are in the ring.
        """
        request = abi.KVM_REGISTER_COALESCED_MMIO if on else abi.KVM_UNREGISTER_COALESCED_MMIO
        ioctl(self.fd, request, abi.kvm_coalesced_mmio_zone(addr=port, size=1, pio=1))

    def can_wake(self) -> bool:
        """True if a line of the IOAPIC may wake a vCPU that has interrupts off (``nmi.py``)."""
        return ioapic_can_wake(self.fd)

    def save(self) -> dict[str, object]:
        """Return the state of the chips in the kernel and of kvm-clock; KvmError."""
        from pyvmm.kvm.state import save_vm  # for snapshots only, as all below

        return save_vm(self)

    def restore(self, data: object, advance_ns: int = 0) -> None:
        """Take what ``save`` returned, ``advance_ns`` ns later for the guest; StateError.

        The chips and all vCPUs must have been made.
        """
        from pyvmm.kvm.state import restore_vm

        restore_vm(self, data, advance_ns)

    def create_vcpu(self, index: int) -> Vcpu:
        """Create vCPU ``index``, which is also its APIC ID; index 0 is the boot processor."""
        fd = ioctl(self.fd, abi.KVM_CREATE_VCPU, index)
        try:
            page = mmap.mmap(fd, self._mmap_bytes)
        except OSError as error:
            os.close(fd)
            raise HostError(f"cannot map the run page of vCPU {index}: {error}") from error
        with contextlib.suppress(OSError):  # a child that had it would keep the VM
            page.madvise(mmap.MADV_DONTFORK)
        return Vcpu(fd, page, index, self._kvm)


class Vcpu(_Handle):
    """One virtual CPU and its run page; used by one thread, except ``request_exit``."""

    __slots__ = ("_map", "_ring", "cpuid", "enter", "index", "kvm", "page")

    def __init__(
        self, fd: int, mapping: mmap.mmap, index: int = 0, kvm: Kvm | None = None
    ) -> None:
        super().__init__(fd)
        self.index = index
        self.kvm = kvm
        self._map = mapping
        self._ring: CoalescedRing | None = None
        self.enter = vcpu_entry(fd)
        """KVM_RUN itself, for a loop that cannot afford ``run``; raises the kernel's OSError."""
        self.page = RunPage(mapping)
        self.cpuid = b""
        """CPUID's answers in the guest, as ``struct kvm_cpuid2``; empty before ``set_cpuid``."""

    def __enter__(self) -> Vcpu:
        return self

    def run(self) -> int:
        """Enter the guest until it exits; return the exit reason (see ``exits``).

        InterruptedError if a signal or ``request_exit`` ended it, KvmError if KVM refused.
        """
        try:
            self.enter()
        except InterruptedError:
            raise
        except OSError as error:
            raise KvmError("KVM_RUN", error.errno or errno.EIO) from error
        return self.page.exit_reason

    def request_exit(self) -> None:
        """Make the next KVM_RUN return at once; with a signal to its thread, the current one.

        Safe from any thread and from a signal handler (KVM_CAP_IMMEDIATE_EXIT).
        """
        self.page.set_immediate_exit(True)

    def clear_exit_request(self) -> None:
        """Let KVM_RUN run again."""
        self.page.set_immediate_exit(False)

    def get_regs(self) -> abi.kvm_regs:
        """Return the general registers, rip and rflags."""
        regs = abi.kvm_regs()
        ioctl(self.fd, abi.KVM_GET_REGS, regs)
        return regs

    def set_regs(self, regs: abi.kvm_regs) -> None:
        """Set the general registers, rip and rflags."""
        ioctl(self.fd, abi.KVM_SET_REGS, regs)

    def get_sregs(self) -> abi.kvm_sregs:
        """Return segments, descriptor tables, control registers, EFER."""
        sregs = abi.kvm_sregs()
        ioctl(self.fd, abi.KVM_GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        """Set segments, descriptor tables, control registers, EFER."""
        ioctl(self.fd, abi.KVM_SET_SREGS, sregs)

    def get_fpu(self) -> abi.kvm_fpu:
        """Return x87 and SSE state."""
        fpu = abi.kvm_fpu()
        ioctl(self.fd, abi.KVM_GET_FPU, fpu)
        return fpu

    def set_fpu(self, fpu: abi.kvm_fpu) -> None:
        """Set x87 and SSE state without MXCSR, which KVM ignores here (it is 0x1F80 at reset)."""
        ioctl(self.fd, abi.KVM_SET_FPU, fpu)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return the values of ``indices`` up to the first MSR that KVM does not know."""
        wanted = list(indices)
        buffer = msr_buffer(dict.fromkeys(wanted, 0))
        count = ioctl(self.fd, abi.KVM_GET_MSRS, buffer)
        return dict(itertools.islice(MSR_ENTRY.iter_unpack(buffer[MSR_HEAD.size :]), count))

    def set_msrs(self, msrs: Mapping[int, int]) -> None:
        """Set MSRs by index, in order; KvmError names the first that KVM refuses."""
        count = ioctl(self.fd, abi.KVM_SET_MSRS, msr_buffer(msrs))
        if count < len(msrs):
            refused = list(msrs)[count]
            raise KvmError("KVM_SET_MSRS", errno.EINVAL, f"MSR {refused:#x} refused")

    def set_cpuid(self, entries: Iterable[CpuidEntry] | bytes) -> None:
        """Set CPUID's answers in the guest, or those that ``cpuid`` had; before the first run."""
        packed = bytearray(entries) if isinstance(entries, bytes) else cpuid_entry.pack(entries)
        ioctl(self.fd, abi.KVM_SET_CPUID2, packed)
        self.cpuid = bytes(packed)

    def translate(self, linear_address: int) -> int | None:
        """Return the guest physical address that the vCPU's page tables give; None if unmapped."""
        request = abi.kvm_translation(linear_address=linear_address)
        ioctl(self.fd, abi.KVM_TRANSLATE, request)
        address: int = request.physical_address
        return address if request.valid else None

    def get_mp_state(self) -> int:
        """Return a ``KVM_MP_STATE_*``: runnable, halted, waiting for INIT or SIPI."""
        state = abi.kvm_mp_state()
        ioctl(self.fd, abi.KVM_GET_MP_STATE, state)
        number: int = state.mp_state
        return number

    def pit_can_wake(self) -> bool:
        """True if the PIT may wake the vCPU though it has interrupts off (``nmi.py``)."""
        return pit_can_wake(self.fd)

    def coalesced_ring(self, page: int) -> CoalescedRing | None:
        """Return the ring of ``Vm.gather_port``, for writes of any vCPU; valid until ``close``.

        ``page`` is ``Kvm.ring_page``; None if that is 0.
        """
        if self._ring is None and page:
            at = page * mmap.PAGESIZE
            self._ring = CoalescedRing(memoryview(self._map)[at : at + mmap.PAGESIZE])
        return self._ring

    def note_pause(self) -> None:
        """Have kvm-clock tell the guest that this vCPU was paused (KVM_CAP_KVMCLOCK_CTRL).

        Otherwise the guest's watchdogs would take the time for a lock-up.
        """
        # KVM refuses it for a guest without kvm-clock.  Such a guest cannot be told.
        with contextlib.suppress(KvmError):
            ioctl(self.fd, abi.KVM_KVMCLOCK_CTRL)

    def save(self) -> dict[str, object]:
        """Return the state of a vCPU whose last KVM_RUN was interrupted; KvmError."""
        from pyvmm.kvm.state import save_vcpu

        return save_vcpu(self)

    def restore(self, data: object, advance_ns: int = 0) -> None:
        """Take what ``save`` returned, after ``set_cpuid`` and before the first run; StateError.

        The TSC has counted on for ``advance_ns`` nanoseconds since the save.
        """
        from pyvmm.kvm.state import restore_vcpu

        restore_vcpu(self, data, advance_ns)

    def close(self) -> None:
        """Unmap the run page and close the fd; idempotent."""
        if self._ring is not None:
            self._ring.release()
        self.page.release()
        self._map.close()
        super().close()
