"""The record ``host``: the CPU that the guest knows, and whether this host can go on with it.

KVM_SET_CPUID2 takes any bits, and a guest that uses an instruction its new host lacks dies much
later.  So the vendor, each feature, the state components and the TSC rate are compared first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from pyvmm.config import MAX_CPUS
from pyvmm.errors import SnapshotError, StateError
from pyvmm.kvm import cpuid_entry
from pyvmm.kvm.cpuid_entry import CpuidEntry
from pyvmm.startup.types import Record
from pyvmm.state import Fields

TSC_TOLERANCE_PPM = 250
"""Within these KVM runs a guest at the host's own rate: its parameter tsc_tolerance_ppm."""
_MAX_TSC_KHZ = 100_000_000
_MAX_ENTRIES = 1024
_HEADER_BYTES, _ENTRY_BYTES = 8, 40
_VENDOR = struct.Struct("=I12x4s4s4s12x")  # of an entry: function, and ebx ecx edx of leaf 0
_XSAVE_LEAF = 0xD
_ADDRESS_SIZES = 0x8000_0008
_MOST_NAMES = 8
# KVM has them in software for every guest, and need not list them as supported; "ht" tells a guest
# with several vCPUs of their topology.
_ALWAYS_THERE = frozenset({"hypervisor", "tsc_deadline_timer", "x2apic", "ht"})
# Registers of leaves, as offsets in an entry, that tell on which CPU of a host KVM was asked: older
# kernels pass them on.  They are leaf 1 EBX, leaves 0xB and 0x1F EDX, leaf 0x8000001E EAX and EBX.
_DIFFERING: Mapping[int, tuple[int, ...]] = MappingProxyType({
    1: (16,), 0xB: (24,), 0x1F: (24,), 0x8000_001E: (12, 16),
})

_Entries = dict[tuple[int, int], CpuidEntry]


class SavedHost(Record):
    """The record ``host``: ``given`` are the packed entries of each vCPU (``Vcpu.cpuid``).

    ``supported`` is what the host's KVM offered then, packed, to see at once that this host is the
    same.
    """

    vendor: str
    given: tuple[bytes, ...]
    supported: bytes
    tsc_khz: int | None


def host_record(
    *,
    supported: Iterable[CpuidEntry],
    given: Sequence[bytes | bytearray],
    tsc_khz: int | None,
) -> dict[str, object]:
    """Return the record ``host``: ``supported`` is ``Kvm.supported_cpuid()``, ``given`` the packed
    entries of each vCPU, ``tsc_khz`` the guest's TSC rate."""
    packed = cpuid_entry.pack(supported)
    return {
        "vendor": _vendor(packed),
        "supported": _fingerprint(packed),
        "cpuid": [bytes(one) for one in given],
        "tsc_khz": tsc_khz,
    }


def read_host(data: object, *, name: str) -> SavedHost:
    """Return what ``host_record`` made; SnapshotError, naming the file ``name``."""
    try:
        fields = Fields("host", data)
        vendor = fields.optional_text("vendor", 12) or ""
        supported = fields.octets("supported", 0, _HEADER_BYTES + _MAX_ENTRIES * _ENTRY_BYTES)
        packed = fields.take("cpuid")
        tsc_khz = fields.optional_integer("tsc_khz", 1, _MAX_TSC_KHZ)
        fields.end()
        if not isinstance(packed, list) or not 1 <= len(packed) <= MAX_CPUS:
            raise fields.error("cpuid", f"is no list of 1 to {MAX_CPUS} vCPUs")
        given = tuple(_checked(fields, one) for one in packed)
    except StateError as error:
        raise SnapshotError(name, f"record {error.part}: {error.problem}") from None
    return SavedHost(vendor=vendor, given=given, supported=supported, tsc_khz=tsc_khz)


def check_host(
    saved: SavedHost,
    *,
    name: str,
    supported: bytearray,
    tsc_khz: int | None,
    scales_tsc: bool,
) -> None:
    """Raise SnapshotError, about the snapshot ``name``, if this host cannot go on with its guest.

    ``supported``, as ``Kvm.packed_cpuid`` returns it, and ``tsc_khz`` are this host's;
    ``scales_tsc`` is KVM_CAP_TSC_CONTROL.
    """
    vendor = _vendor(supported)
    if saved.vendor != vendor:
        raise SnapshotError(
            name, f"was made on a CPU of {saved.vendor!r}, and this host's is of {vendor!r}; a "
            "guest cannot move between vendors",
        )
    # Bytes are compared first, because making objects of dozens of entries takes longer.
    if saved.supported != _fingerprint(supported):
        _check_features(saved, name, cpuid_entry.unpack(supported))
    if saved.tsc_khz is None or tsc_khz is None or scales_tsc:
        return
    if abs(saved.tsc_khz - tsc_khz) * 1_000_000 > TSC_TOLERANCE_PPM * tsc_khz:
        raise SnapshotError(
            name, f"its guest's TSC runs at {saved.tsc_khz} kHz, this host's at {tsc_khz} kHz, and "
            "this host's KVM cannot scale it",
        )


def _check_features(saved: SavedHost, name: str, supported: list[CpuidEntry]) -> None:
    """Raise SnapshotError if a vCPU was given a feature that is not among ``supported``."""
    # Only a host that differs needs the names, whose import takes longer than the rest of this.
    from pyvmm.x86.cpu_features import COMPONENTS, WORDS, bit_name

    words = [*WORDS, (_XSAVE_LEAF, 0, "eax"), (_XSAVE_LEAF, 0, "edx")]
    offered = _by_leaf(supported)
    missing: dict[str, None] = {}
    # KVM lets every vCPU have its own; pyvmm gives all of them the same features.
    given = [_by_leaf(cpuid_entry.unpack(bytearray(packed))) for packed in saved.given]
    for entries in given:
        for word in words:
            bits = _register(entries, word) & ~_register(offered, word)
            for bit in range(bits.bit_length()):
                if not bits >> bit & 1:
                    continue
                feature = bit_name(word, bit)
                if word[0] == _XSAVE_LEAF and word[1] == 0:
                    place = 1 << (bit + 32 * (word[2] == "edx"))
                    owners = [names for mask, names in COMPONENTS if mask & place]
                    feature = f"the state of {owners[0].split()[0]}" if owners else feature
                if feature not in _ALWAYS_THERE:
                    missing[feature] = None
    if missing:
        shown = ", ".join(list(missing)[:_MOST_NAMES])
        more = f" and {len(missing) - _MOST_NAMES} more" if len(missing) > _MOST_NAMES else ""
        raise SnapshotError(
            name, f"its guest uses CPU features that this host's KVM does not offer: {shown}{more}"
        )
    word = (_ADDRESS_SIZES, 0, "eax")
    own = _register(offered, word) & 0xFF
    most = max(_register(entries, word) & 0xFF for entries in given)
    if most > own:
        raise SnapshotError(
            name, f"its guest knows {most} bits of physical address, and this host has {own}"
        )


def _checked(fields: Fields, data: object) -> bytes:
    """Return ``data`` if it is packed entries."""
    if not isinstance(data, bytes) or len(data) < _HEADER_BYTES:
        raise fields.error("cpuid", "has a vCPU without entries")
    count = int.from_bytes(data[:4], "little")
    if count > _MAX_ENTRIES or len(data) != _HEADER_BYTES + count * _ENTRY_BYTES:
        raise fields.error("cpuid", f"has {len(data)} bytes for {count} entries")
    return data


def _vendor(packed: bytearray) -> str:
    for function, ebx, ecx, edx in _VENDOR.iter_unpack(packed[_HEADER_BYTES:]):
        if function == 0:
            raw: bytes = ebx + edx + ecx
            return raw.decode("ascii", "backslashreplace")[:12]
    return ""


def _fingerprint(packed: bytearray) -> bytes:
    """Return the entries ``packed`` without the registers in which the CPUs of a host differ."""
    found = bytearray(packed)
    for at in range(_HEADER_BYTES, len(packed), _ENTRY_BYTES):
        for offset in _DIFFERING.get(int.from_bytes(packed[at : at + 4], "little"), ()):
            found[at + offset : at + offset + 4] = bytes(4)
    return bytes(found)


def _by_leaf(entries: Iterable[CpuidEntry]) -> _Entries:
    return {(entry.function, entry.index): entry for entry in entries}


def _register(entries: _Entries, word: tuple[int, int, str]) -> int:
    entry = entries.get(word[:2])
    value: int = 0 if entry is None else getattr(entry, word[2])
    return value
