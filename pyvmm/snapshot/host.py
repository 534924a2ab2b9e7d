"""Can this host run a snapshot's vCPUs: the vendor and the features of the processor."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from pyvmm.errors import SnapshotError
from pyvmm.kvm.cpuid_entry import CpuidEntry, unpack
from pyvmm.kvm.handles import Kvm
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.state import Fields
from pyvmm.x86.cpu_features import WORDS, bit_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_HEAD, _ENTRY, _MOST_ENTRIES = 8, 40, 4096  # struct kvm_cpuid2
_Answers = Mapping[tuple[int, int], CpuidEntry]


def vendor_of(entries: Iterable[CpuidEntry]) -> str:
    """Return the processor's vendor, such as ``GenuineIntel``; "" without leaf 0."""
    for entry in entries:
        if entry.function == 0:
            name = struct.pack("<III", entry.ebx, entry.edx, entry.ecx)
            return name.decode("ascii", "replace")
    return ""


def host_record(cpuid: Sequence[bytes]) -> dict[str, object]:
    """Return the record ``host``: what a host needs to run vCPUs that were given ``cpuid``."""
    return {"vendor": vendor_of(unpack(bytearray(cpuid[0]))), "cpuid": list(cpuid)}


def read_host(data: object, cpus: int) -> tuple[bytes, ...]:
    """Return the CPUID of each vCPU, as ``host_record`` has it; StateError."""
    fields = Fields("host", data)
    fields.optional_text("vendor", 12)
    cpuid = fields.take("cpuid")
    fields.end()
    if not isinstance(cpuid, list) or len(cpuid) != cpus:
        raise fields.error("cpuid", f"is not a list of {cpus} answers")
    found = tuple(one for one in cpuid if isinstance(one, bytes) and _is_cpuid(one))
    if len(found) != cpus:
        raise fields.error("cpuid", "has an element that is no answer of CPUID")
    return found


def _is_cpuid(packed: bytes) -> bool:
    if not _HEAD <= len(packed) <= _HEAD + _MOST_ENTRIES * _ENTRY:
        return False
    count = int.from_bytes(packed[:4], "little")
    return _HEAD + count * _ENTRY == len(packed)


def check_host(cpuid: Sequence[bytes], name: str) -> None:
    """Raise SnapshotError, naming the snapshot, unless this host has all that ``cpuid`` promises.

    HostError if there is no /dev/kvm.
    """
    with Kvm() as kvm:
        offered = kvm.supported_cpuid()
    here = {(entry.function, entry.index): entry for entry in offered}
    saved = {(e.function, e.index): e for e in unpack(bytearray(cpuid[0]))}
    theirs, ours = vendor_of(saved.values()), vendor_of(offered)
    if theirs != ours:
        raise SnapshotError(
            name, f"was made on a processor of {theirs}, and this host's is of {ours}; a snapshot "
            "goes on only on the same vendor's"
        )
    missing = _missing(saved, here)
    if missing:
        raise SnapshotError(
            name, f"its guest uses {', '.join(missing)}, which this host's KVM does not offer; "
            "make the snapshot with --cpu base, or without these features"
        )


def _missing(saved: _Answers, here: _Answers) -> list[str]:
    """Return the names of feature bits that are set in ``saved`` and not in ``here``, sorted."""
    found = set()
    for word in WORDS:
        function, index, register = word
        entry = saved.get((function, index))
        if entry is None:
            continue
        own = here.get((function, index))
        absent = getattr(entry, register) & ~(getattr(own, register) if own else 0)
        found |= {bit_name(word, bit) for bit in range(32) if absent >> bit & 1}
    return sorted(found - _OURS)


_OURS = frozenset({"hypervisor", "ht", "tsc_deadline_timer"})
"""Features that pyvmm or KVM adds to what the host has."""
