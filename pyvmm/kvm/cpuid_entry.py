"""One answer of CPUID, and lists of them as ``struct kvm_cpuid2`` has them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable

from pyvmm.kvm import abi
from pyvmm.startup.types import Record

# struct kvm_cpuid_entry2, dozens of them a vCPU: function index flags eax ebx ecx edx padding[3].
_ENTRY = struct.Struct("=7I12x")


class CpuidEntry(Record, kw_only=False):
    """CPUID's answer for EAX=``function``, and ECX=``index`` where ``has_index``."""

    function: int
    index: int
    has_index: bool
    eax: int
    ebx: int
    ecx: int
    edx: int


def pack(entries: Iterable[CpuidEntry]) -> bytearray:
    """Return ``entries`` behind the header that counts them."""
    records = [
        _ENTRY.pack(
            entry.function, entry.index,
            abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX if entry.has_index else 0,
            entry.eax, entry.ebx, entry.ecx, entry.edx,
        )
        for entry in entries
    ]
    head = bytes(abi.kvm_cpuid2(nent=len(records)))
    return bytearray(head + b"".join(records))


def room_for(count: int) -> bytearray:
    """Return a buffer into which KVM may write ``count`` entries."""
    return bytearray(bytes(abi.kvm_cpuid2(nent=count)) + bytes(count * _ENTRY.size))


def cut(buffer: bytearray) -> bytearray:
    """Return ``buffer`` without the room that KVM left."""
    count = abi.kvm_cpuid2.from_buffer_copy(buffer).nent
    return buffer[: ctypes.sizeof(abi.kvm_cpuid2) + count * _ENTRY.size]


def unpack(buffer: bytearray) -> list[CpuidEntry]:
    """Return the entries that KVM wrote into ``buffer``."""
    count = abi.kvm_cpuid2.from_buffer_copy(buffer).nent
    start = ctypes.sizeof(abi.kvm_cpuid2)
    return [
        CpuidEntry(function, index, bool(flags & abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX), *registers)
        for function, index, flags, *registers in _ENTRY.iter_unpack(
            buffer[start : start + count * _ENTRY.size]
        )
    ]
