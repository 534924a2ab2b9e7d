"""CPUID as the guest sees it: a CPU model applied to the leaves that KVM supports.

Leaves and bits: Intel SDM volume 2, CPUID; AMD64 APM volume 3, appendix E; KVM's own leaves:
Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pyvmm.errors import ConfigError
from pyvmm.kvm.abi import KVM_CPUID_FEATURES, KVM_CPUID_SIGNATURE
from pyvmm.kvm.cpuid_entry import CpuidEntry
from pyvmm.x86.cpu_features import (
    COMPONENTS,
    DEPENDENTS,
    ESSENTIAL,
    LEAVES,
    NESTED,
    POSITIONS,
    REPEATED,
    STATEFUL,
    WORDS,
    Word,
    bit_name,
    with_dependents,
)
from pyvmm.x86.cpu_mask import OPTION, CpuModel
from pyvmm.x86.cpu_model import parse_cpu_option

__all__ = ["CpuModel", "build", "parse_cpu_option"]

_LEGACY_XSAVE_BYTES = 576  # legacy region and header
_SMT_LEVEL, _CORE_LEVEL = 1, 2  # level types of leaves 0xB and 0x1F
_SHARED_CACHE_LEVEL = 3
_RANGES = (0, 0x8000_0000)  # leaves whose eax is the last leaf of their range
_RANGE_LEAVES = 0x1000_0000
_ADDRESS_SIZES = 0x8000_0008
_MIN_PHYSICAL_BITS = 36  # every 64-bit processor has as many
_LINEAR_BITS = 48  # with four levels of page tables; la57 has five
_LINEAR_ADDRESS = f"leaf {_ADDRESS_SIZES:#x} eax, the size of a linear address"

_WORD = 0xFFFF_FFFF

_Entries = dict[tuple[int, int], CpuidEntry]


def build(
    supported: Iterable[CpuidEntry],
    model: CpuModel,
    vcpu_id: int,
    *,
    vcpu_count: int = 1,
    tsc_deadline: bool = False,
    memory_end: int = 0,
) -> list[CpuidEntry]:
    """Return the entries for KVM_SET_CPUID2 of vCPU ``vcpu_id`` (its APIC ID) out of
    ``vcpu_count``.

    ``supported`` is ``Kvm.supported_cpuid()``.  Two things that it never has are added: the
    hypervisor bit, and the TSC deadline timer if KVM has KVM_CAP_TSC_DEADLINE_TIMER
    (``tsc_deadline``).  The result is closed, whatever KVM offers: no feature is there without
    those that it needs.  ``svm`` and ``vmx`` are there only if the model asks for them.

    ConfigError if the model asks for a feature that is not there, or takes one away that every
    64-bit Linux needs.  Likewise if it leaves too few bits of physical address to reach
    ``memory_end``, the end of the guest's memory.
    """
    entries = {(entry.function, entry.index): entry for entry in supported}
    _set_feature(entries, "hypervisor", True)
    if tsc_deadline:
        _set_feature(entries, "tsc_deadline_timer", True)
    for name in NESTED - _asked_for(model):
        _set_feature(entries, name, False)
    _close(entries)
    _check_host(entries, model)
    takes_away = model.functions is not None or model.masks or model.removed
    before = _essentials(entries) if takes_away else {}
    host_bits = _physical_bits(entries)
    if takes_away:
        _apply(entries, model)
        _check_result(entries, model)
        if not _has_feature(entries, "la57"):
            before[_LINEAR_ADDRESS] = min(before[_LINEAR_ADDRESS], _LINEAR_BITS)
        _check_essentials(before, _essentials(entries), model)
        _check_physical_bits(host_bits, _physical_bits(entries), memory_end, model)
    _describe_kvm(entries)
    _describe_topology(entries, vcpu_id, vcpu_count)
    return list(entries.values())


def _check_host(entries: _Entries, model: CpuModel) -> None:
    """Raise ConfigError if the host lacks a feature that ``model`` needs."""
    for name in sorted(model.required):
        if not _has_feature(entries, name):
            raise ConfigError(OPTION, f"+{name}: this host's KVM does not offer it to guests")
    missing = _missing(entries, model)
    if missing:
        raise ConfigError(
            f"{OPTION} {model.name}", f"this host's KVM does not offer {', '.join(missing)}"
        )


def _check_result(entries: _Entries, model: CpuModel) -> None:
    """Raise ConfigError if ``model`` requires a feature that it has taken away itself."""
    for name in sorted(model.required):
        if not _has_feature(entries, name):
            raise ConfigError(OPTION, f"+{name}: the model {model.name} leaves it out")
    missing = _missing(entries, model)
    if missing:
        raise ConfigError(
            f"{OPTION} {model.name}",
            f"wants {', '.join(missing)}, and takes that away too, or what it rests on",
        )


def _essentials(entries: _Entries) -> dict[str, int]:
    """Return, for each thing that every 64-bit Linux relies on, its words and CPUID's value or
    0."""
    found = {name: int(_has_feature(entries, name)) for name in ESSENTIAL}
    for first in _RANGES:
        last = _register(entries, (first, 0, "eax"))
        found[f"leaf {first:#x} eax, the number of the last leaf"] = int(last > first)
    linear = _register(entries, (_ADDRESS_SIZES, 0, "eax")) >> 8 & 0xFF
    found[_LINEAR_ADDRESS] = linear
    return found


def _physical_bits(entries: _Entries) -> int:
    return _register(entries, (_ADDRESS_SIZES, 0, "eax")) & 0xFF


def _check_physical_bits(host_bits: int, bits: int, memory_end: int, model: CpuModel) -> None:
    """Raise ConfigError if ``model`` took away more address bits than a fleet's mask may."""
    needed = max(_MIN_PHYSICAL_BITS, (memory_end - 1).bit_length() if memory_end else 0)
    if bits < min(host_bits, needed):
        raise ConfigError(
            f"{OPTION} {model.name}",
            f"leaf {_ADDRESS_SIZES:#x} eax leaves {bits} bits of physical address, "
            f"this machine needs {needed}",
        )


def _check_essentials(before: dict[str, int], after: dict[str, int], model: CpuModel) -> None:
    """Raise ConfigError if ``model`` took away an essential that the host had."""
    lost = [what for what, value in before.items() if value and after[what] != value]
    if lost:
        raise ConfigError(
            f"{OPTION} {model.name}",
            f"takes away {', '.join(lost)}, without which no 64-bit Linux runs",
        )


def _missing(entries: _Entries, model: CpuModel) -> list[str]:
    """Return the names of bits that ``model`` demands and that are not set, sorted.

    A feature that the user removes by name is not demanded any more, nor are its dependents.
    """
    excused = {position for name in with_dependents(model.removed) for position in POSITIONS[name]}
    names = set()
    for mask in model.masks:
        absent = mask.demand & ~_register(entries, mask.word)
        names |= {
            bit_name(mask.word, bit)
            for bit in range(32)
            if absent >> bit & 1 and (mask.word, bit) not in excused
        }
    return sorted(names)


def _apply(entries: _Entries, model: CpuModel) -> None:
    """Take away everything that ``model`` does not keep, with its dependents."""
    gone = model.removed
    if model.functions is not None or model.masks:
        before = _bits_set(entries)
        if model.functions is not None:
            _keep_functions(entries, model.functions)
        for mask in model.masks:
            function, index, register = mask.word
            entry = entries.get((function, index))
            if entry is not None:
                value = _register(entries, mask.word) & mask.keep
                entries[function, index] = _with(entry, {register: value})
        # A feature that lost one of its bits is to be gone from every leaf that repeats it.
        lost = before - _bits_set(entries)
        gone |= {name for name, positions in POSITIONS.items() if lost.intersection(positions)}
    for name in gone:
        _set_feature(entries, name, False)
    _close(entries)


def _asked_for(model: CpuModel) -> set[str]:
    """The features of NESTED that ``model`` demands, or whose dependents it demands."""
    demanded = model.required | {
        bit_name(mask.word, bit)
        for mask in model.masks for bit in range(32) if mask.demand >> bit & 1
    }
    return {name for name in NESTED if demanded and demanded & with_dependents([name])}


def _close(entries: _Entries) -> None:
    """Take away all features whose needs are not met.  A second pass would find none."""
    values = {word: _register(entries, word) for word in WORDS}

    def has(name: str) -> bool:
        first = POSITIONS[name][0][0]
        return any(values[first] >> bit & 1 for word, bit in POSITIONS[name] if word == first)

    def clear(name: str) -> None:
        for word, bit in POSITIONS[name]:
            values[word] &= ~(1 << bit)

    state = entries.get((0xD, 0))
    if state is None:
        clear("xsave")
    else:
        for name, bits in STATEFUL.items():
            if bits & ~state.eax:
                clear(name)
    for name in REPEATED:
        if not has(name):
            clear(name)
    for name, dependents in DEPENDENTS.items():  # in this order one pass is enough
        if not has(name):
            for dependent in dependents.split():
                clear(dependent)
    for word, value in values.items():
        function, index, register = word
        if value != _register(entries, word):
            entries[function, index] = _with(entries[function, index], {register: value})
    leaves = {leaf for name, owned in LEAVES.items() if not has(name) for leaf in owned}
    for key in [key for key in entries if key[0] in leaves]:
        del entries[key]
    _close_components(entries)
    sizes = entries.get((_ADDRESS_SIZES, 0))
    if sizes is not None and not has("la57"):
        linear = min(sizes.eax >> 8 & 0xFF, _LINEAR_BITS)
        entries[_ADDRESS_SIZES, 0] = sizes.replace(eax=sizes.eax & ~0xFF00 | linear << 8)


def _close_components(entries: _Entries) -> None:
    """Take out of leaf 0xD the state of features that are gone, and correct the area's size."""
    head, more = entries.get((0xD, 0)), entries.get((0xD, 1))
    if head is None:
        return
    ownerless = 0
    for bits, owners in COMPONENTS:
        if not any(_has_feature(entries, owner) for owner in owners.split()):
            ownerless |= bits
    user = (head.eax | head.edx << 32) & ~ownerless
    supervisor = 0
    if more is not None:
        if _has_feature(entries, "xsaves"):
            supervisor = (more.ecx | more.edx << 32) & ~ownerless
        entries[0xD, 1] = more.replace(ecx=supervisor & _WORD, edx=supervisor >> 32)
    size = _LEGACY_XSAVE_BYTES
    for (function, index), entry in list(entries.items()):
        if function != 0xD or index < 2:
            continue
        if not (user | supervisor) >> index & 1:
            del entries[function, index]
        elif user >> index & 1:  # eax is its size, ebx its offset
            size = max(size, entry.eax + entry.ebx)
    if user != head.eax | head.edx << 32:
        entries[0xD, 0] = head.replace(eax=user & _WORD, edx=user >> 32, ebx=size, ecx=size)


def _keep_functions(entries: _Entries, functions: frozenset[int]) -> None:
    """Delete all leaves but ``functions``, and lower the numbers of the last ones accordingly."""
    for key in [key for key in entries if key[0] not in functions]:
        del entries[key]
    for first in _RANGES:
        head = entries.get((first, 0))
        if head is not None:
            left = [f for f, _ in entries if first <= f < first + _RANGE_LEAVES]
            entries[first, 0] = head.replace(eax=min(head.eax, max(left)))


def _register(entries: _Entries, word: Word) -> int:
    """Return the register's value, 0 if there is no such leaf."""
    function, index, register = word
    entry = entries.get((function, index))
    value: int = getattr(entry, register) if entry is not None else 0
    return value


def _bits_set(entries: _Entries) -> set[tuple[Word, int]]:
    """Return the named bits that are set."""
    return {
        (word, bit)
        for positions in POSITIONS.values()
        for word, bit in positions
        if _register(entries, word) >> bit & 1
    }


def _has_feature(entries: _Entries, name: str) -> bool:
    """True if the first leaf that has the feature's bit says so; later leaves only repeat it."""
    first = POSITIONS[name][0][0]
    value = _register(entries, first)
    return any(value >> bit & 1 for word, bit in POSITIONS[name] if word == first)


def _set_feature(entries: _Entries, name: str, on: bool) -> None:
    """Set or clear every bit of that name, in the leaves that exist."""
    for word, bit in POSITIONS[name]:
        function, index, register = word
        entry = entries.get((function, index))
        if entry is not None:
            value = getattr(entry, register)
            changed = value | 1 << bit if on else value & ~(1 << bit)
            if changed != value:
                entries[function, index] = _with(entry, {register: changed})


def _with(entry: CpuidEntry, registers: Mapping[str, int]) -> CpuidEntry:
    return entry.replace(**registers)


def _describe_kvm(entries: _Entries) -> None:
    """Add the signature by which Linux finds kvm-clock; some relatives of KVM do not give it."""
    ebx, ecx, edx = (int.from_bytes(part, "little") for part in (b"KVMK", b"VMKV", b"M\0\0\0"))
    entries[KVM_CPUID_SIGNATURE, 0] = CpuidEntry(
        KVM_CPUID_SIGNATURE, 0, False, KVM_CPUID_FEATURES, ebx, ecx, edx
    )
    features = CpuidEntry(KVM_CPUID_FEATURES, 0, False, 0, 0, 0, 0)
    entries.setdefault((KVM_CPUID_FEATURES, 0), features)


def _describe_topology(entries: _Entries, vcpu_id: int, vcpu_count: int) -> None:
    """Describe one package of ``vcpu_count`` cores, one thread each: KVM would leave the host's."""
    basic = entries.get((1, 0))
    if basic is not None:
        entries[1, 0] = basic.replace(
            ebx=basic.ebx & 0xFFFF | min(vcpu_count, 255) << 16 | (vcpu_id & 0xFF) << 24
        )
        _set_feature(entries, "ht", vcpu_count > 1)
    core_bits = (vcpu_count - 1).bit_length()
    for function in {function for function, _ in entries if function in (0xB, 0x1F)}:
        for key in [key for key in entries if key[0] == function]:
            del entries[key]
        levels = ((0, 1, _SMT_LEVEL), (core_bits, vcpu_count, _CORE_LEVEL), (0, 0, 0))
        for index, (shift, count, kind) in enumerate(levels):
            entries[function, index] = CpuidEntry(
                function, index, True, shift, count, kind << 8 | index, vcpu_id
            )
    for key, entry in list(entries.items()):
        entries[key] = _with_topology(entry, vcpu_id, vcpu_count, core_bits)


def _with_topology(
    entry: CpuidEntry, vcpu_id: int, vcpu_count: int, core_bits: int
) -> CpuidEntry:
    """Return ``entry`` with the guest's topology in its fields, if it has any."""
    cores = vcpu_count - 1
    if entry.function in (4, 0x8000_001D) and entry.eax & 0x1F:  # a cache: Intel's, AMD's leaf
        level = entry.eax >> 5 & 7
        sharers = cores if level == _SHARED_CACHE_LEVEL else 0
        eax = entry.eax & 0x3FFF | min(sharers, 0xFFF) << 14
        if entry.function == 4:
            eax |= min(cores, 63) << 26
        return entry.replace(eax=eax)
    if entry.function == _ADDRESS_SIZES:
        return entry.replace(ecx=entry.ecx & ~0xF0FF | core_bits << 12 | min(cores, 255))
    if entry.function == 0x8000_001E:
        return entry.replace(eax=vcpu_id, ebx=vcpu_id & 0xFF, ecx=0)
    return entry
