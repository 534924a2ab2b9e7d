"""Answers of /dev/kvm, kept: a jailed process has closed it, and is saved all the same."""

from __future__ import annotations

import errno

from pyvmm.errors import HostError, KvmError
from pyvmm.kvm import cpuid_entry
from pyvmm.kvm.abi import Ioctl
from pyvmm.kvm.ioctl import ioctl
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.kvm.cpuid_entry import CpuidEntry
    from pyvmm.kvm.handles import Kvm

# Of ``state_abi``, whose structures would take each start 1 ms: linux/kvm.h.
KVM_GET_MSR_INDEX_LIST = Ioctl(0xC004AE02)
CAPABILITIES = (200, 208, 56, 61)
"""KVM_CAP_SREGS2, XSAVE2, XCRS and GET_TSC_KHZ."""
_MOST_MSRS = 4096


class Answers:
    """The answers of ``kvm``, which never change: each is asked for once.

    HostError for one that was not asked for before ``kvm`` was closed; KvmError.
    """

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._capabilities: dict[int, int] = {}
        self._msr_indices: tuple[int, ...] | None = None
        self._cpuid: bytearray | None = None

    def ask_all(self) -> None:
        """Ask for everything that a save, a restore and a snapshot's record of the host need."""
        for capability in CAPABILITIES:
            self.capability(capability)
        self.msr_indices()
        self._packed_cpuid()

    def capability(self, number: int) -> int:
        """Return the answer of ``Kvm.check_extension``."""
        if number not in self._capabilities:
            self._capabilities[number] = self._open_kvm().check_extension(number)
        return self._capabilities[number]

    def msr_indices(self) -> tuple[int, ...]:
        """Return the indices that KVM_GET_MSR_INDEX_LIST has."""
        if self._msr_indices is None:
            self._msr_indices = _msr_indices(self._open_kvm())
        return self._msr_indices

    def supported_cpuid(self) -> list[CpuidEntry]:
        """Return ``Kvm.supported_cpuid``."""
        return cpuid_entry.unpack(self._packed_cpuid())

    def _packed_cpuid(self) -> bytearray:
        if self._cpuid is None:
            self._cpuid = self._open_kvm().packed_cpuid()
        return self._cpuid

    def _open_kvm(self) -> Kvm:
        if self._kvm.fd < 0:
            raise HostError("a vCPU is saved only while the /dev/kvm that made it is open")
        return self._kvm


def answers_of(kvm: Kvm) -> Answers:
    """Return the kept answers of ``kvm``."""
    if kvm.answers is None:
        kvm.answers = Answers(kvm)
    return kvm.answers


def _msr_indices(kvm: Kvm) -> tuple[int, ...]:
    count = 0
    while True:
        data = bytearray(count.to_bytes(4, "little") + bytes(4 * count))  # struct kvm_msr_list
        try:
            ioctl(kvm.fd, KVM_GET_MSR_INDEX_LIST, data)
            return tuple(memoryview(data)[4:].cast("I"))
        except KvmError as error:
            if error.errno != errno.E2BIG or count:
                raise
            count = min(int.from_bytes(data[:4], "little"), _MOST_MSRS)
