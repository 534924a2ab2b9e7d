"""What CPUID tells the guest: ``--cpu host,-xsave`` parsed and applied to what KVM supports.

Feature names are those of /proc/cpuinfo.  Leaves and bits: Intel SDM volume 2, CPUID; AMD64 APM
volume 3, appendix E; KVM's own leaves: Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from pyvmm.errors import ConfigError
from pyvmm.kvm.abi import KVM_CPUID_FEATURES, KVM_CPUID_SIGNATURE
from pyvmm.kvm.handles import CpuidEntry
from pyvmm.lean import Record

OPTION = "--cpu"
_BASE_MODEL = "host"

_Word = tuple[int, int, str]
"""A leaf, its index and the register in it."""

# Names by bit, from bit 0; "-" is a bit without a name.  A feature may be in several words.
_WORDS: Mapping[_Word, str] = MappingProxyType({
    (1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov"
        " pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm"
        " - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx"
        " f16c rdrand hypervisor"
    ),
    (7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a"
        " avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf"
        " avx512er avx512cd sha_ni avx512bw avx512vl"
    ),
    (7, 0, "ecx"): (
        "- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq"
        " avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect"
        " cldemote - movdiri movdir64b enqcmd sgx_lc pks"
    ),
    (7, 0, "edx"): (
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear"
        " - - - serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16"
        " amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities"
        " spec_ctrl_ssbd"
    ),
    (7, 1, "eax"): (
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - - - - -"
        " amx_fp16 - avx_ifma"
    ),
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x8000_0001, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov"
        " pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
    ),
    (0x8000_0001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs"
        " xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext"
        " ptsc perfctr_llc mwaitx"
    ),
    (0x8000_0007, 0, "edx"): "- - - - - - - - constant_tsc",
    (0x8000_0008, 0, "ebx"): (
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs amd_stibp - - - - - -"
        " - amd_ppin amd_ssbd virt_ssbd"
    ),
    (KVM_CPUID_FEATURES, 0, "eax"): (
        "kvmclock kvm_nopiodelay kvm_mmu kvmclock kvm_asyncpf kvm_steal_time kvm_pv_eoi"
        " kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control"
        " kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id - - - - - - - - kvmclock_stable"
    ),
})  # fmt: skip

# A feature and those that make no sense without it (Linux: arch/x86/kernel/cpu/cpuid-deps.c).
_DEPENDENTS: Mapping[str, str] = MappingProxyType({
    "fpu": "fxsr mmx",
    "fxsr": "sse fxsr_opt",
    "sse": "sse2",
    "sse2": "pni pclmulqdq aes sha_ni gfni xsave",
    "pni": "ssse3",
    "ssse3": "sse4_1",
    "sse4_1": "sse4_2",
    "xsave": "osxsave xsaveopt xsavec xsaves xgetbv1 xfd xsaveerptr avx mpx pku amx_tile",
    "avx": "avx2 fma f16c fma4 xop vaes vpclmulqdq avx_vnni avx_ifma sha512 sm3 sm4",
    "avx2": "avx512f",
    "avx512f": (
        "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512_vnni"
        " avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect"
    ),
    "avx512bw": "avx512vbmi avx512_vbmi2 avx512_bitalg avx512_bf16 avx512_fp16",
    "pku": "ospke",
    "amx_tile": "amx_bf16 amx_int8 amx_fp16",
    "kvmclock": "kvmclock_stable",
    "kvm_asyncpf": "kvm_asyncpf_vmexit kvm_asyncpf_int",
    "sgx": "sgx_lc",
})  # fmt: skip

# Leaves that describe one feature, and go with it.
_LEAVES: Mapping[str, frozenset[int]] = MappingProxyType({
    "xsave": frozenset({0xD}),
    "sgx": frozenset({0x12}),
    "intel_pt": frozenset({0x14}),
    "amx_tile": frozenset({0x1D, 0x1E}),
    "svm": frozenset({0x8000_000A}),
    "topoext": frozenset({0x8000_001D, 0x8000_001E}),
})

# The state components of leaf 0xD (bits of XCR0 and IA32_XSS) that belong to a feature.
_COMPONENTS: Mapping[str, int] = MappingProxyType(
    {"avx": 1 << 2, "mpx": 3 << 3, "avx512f": 7 << 5, "pku": 1 << 9, "amx_tile": 3 << 17}
)
_LEGACY_XSAVE_BYTES = 576  # legacy region and header


_SMT_LEVEL, _CORE_LEVEL = 1, 2  # level types of leaves 0xB and 0x1F
_SHARED_CACHE_LEVEL = 3


def _positions() -> dict[str, list[tuple[_Word, int]]]:
    found: dict[str, list[tuple[_Word, int]]] = {}
    for word, names in _WORDS.items():
        for bit, name in enumerate(names.split()):
            if name != "-":
                found.setdefault(name, []).append((word, bit))
    return found


_POSITIONS: Mapping[str, list[tuple[_Word, int]]] = MappingProxyType(_positions())


class CpuModel(Record):
    """The host's CPU without ``removed``; ``required`` must be among what KVM supports."""

    removed: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()


def parse_cpu_option(text: str) -> CpuModel:
    """``host[,-feature][,+feature]...``; ConfigError naming ``--cpu`` and what is wrong."""
    base, *changes = text.split(",")
    if base != _BASE_MODEL:
        raise ConfigError(
            OPTION, f"unknown model {base!r}; the only one is 'host', as in 'host,-xsave'"
        )
    chosen: dict[str, set[str]] = {"-": set(), "+": set()}
    for change in changes:
        sign, name = change[:1], change[1:]
        if sign not in chosen:
            raise ConfigError(OPTION, f"{change!r} is neither '-feature' nor '+feature'")
        if name not in _POSITIONS:
            known = " ".join(sorted(_POSITIONS))
            raise ConfigError(OPTION, f"unknown feature {name!r}; known are: {known}")
        chosen[sign].add(name)
    both = _with_dependents(chosen["-"]) & chosen["+"]
    if both:
        raise ConfigError(OPTION, f"{min(both)!r} is both wanted and removed")
    return CpuModel(removed=frozenset(chosen["-"]), required=frozenset(chosen["+"]))


def build(
    supported: Iterable[CpuidEntry],
    model: CpuModel,
    vcpu_id: int,
    *,
    vcpu_count: int = 1,
    tsc_deadline: bool = False,
) -> list[CpuidEntry]:
    """The entries for KVM_SET_CPUID2 of vCPU ``vcpu_id`` (its APIC ID) out of ``vcpu_count``.

    ``supported`` is ``Kvm.supported_cpuid()``.  Two things that it never says are added: the
    hypervisor bit, and the TSC deadline timer if KVM has KVM_CAP_TSC_DEADLINE_TIMER
    (``tsc_deadline``).  ConfigError if a required feature is missing.
    """
    entries = {(entry.function, entry.index): entry for entry in supported}
    _set_feature(entries, "hypervisor", True)
    if tsc_deadline:
        _set_feature(entries, "tsc_deadline_timer", True)
    for name in sorted(model.required):
        if not _has_feature(entries, name):
            raise ConfigError(OPTION, f"+{name}: this host's KVM does not offer it to guests")
    _remove(entries, _with_dependents(model.removed))
    _describe_kvm(entries)
    _describe_topology(entries, vcpu_id, vcpu_count)
    return list(entries.values())


_Entries = dict[tuple[int, int], CpuidEntry]


def _has_feature(entries: _Entries, name: str) -> bool:
    for (function, index, register), bit in _POSITIONS[name]:
        entry = entries.get((function, index))
        if entry is not None and getattr(entry, register) >> bit & 1:
            return True
    return False


def _set_feature(entries: _Entries, name: str, on: bool) -> None:
    """Set or clear every bit of that name, in the leaves that exist."""
    for (function, index, register), bit in _POSITIONS[name]:
        entry = entries.get((function, index))
        if entry is None:
            continue
        value = getattr(entry, register)
        value = value | 1 << bit if on else value & ~(1 << bit)
        entries[function, index] = _with(entry, {register: value})


def _with(entry: CpuidEntry, registers: Mapping[str, int]) -> CpuidEntry:
    return entry.replace(**registers)


def _with_dependents(names: Iterable[str]) -> frozenset[str]:
    """``names`` and all that cannot be without them."""
    closed: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in closed:
            closed.add(name)
            left += _DEPENDENTS.get(name, "").split()
    return frozenset(closed)


def _remove(entries: _Entries, names: frozenset[str]) -> None:
    gone: frozenset[int] = frozenset()
    for name in names:
        _set_feature(entries, name, False)
        gone |= _LEAVES.get(name, frozenset())
    for key in [key for key in entries if key[0] in gone]:
        del entries[key]
    components = 0
    for name in names & _COMPONENTS.keys():
        components |= _COMPONENTS[name]
    if components:
        _remove_components(entries, components)


def _remove_components(entries: _Entries, components: int) -> None:
    """Take state components out of leaf 0xD, and make its area size that of those left."""
    head = entries.get((0xD, 0))
    if head is None:
        return
    size = _LEGACY_XSAVE_BYTES
    for (function, index), entry in list(entries.items()):
        if function != 0xD or index < 2:
            continue
        if components >> index & 1:
            del entries[function, index]
        elif head.eax >> index & 1:  # a user component: eax is its size, ebx its offset
            size = max(size, entry.eax + entry.ebx)
    entries[0xD, 0] = head.replace(eax=head.eax & ~components, ebx=size, ecx=size)


def _describe_kvm(entries: _Entries) -> None:
    """The signature by which Linux finds kvm-clock; KVM gives it, some of its relatives may not."""
    ebx, ecx, edx = (int.from_bytes(part, "little") for part in (b"KVMK", b"VMKV", b"M\0\0\0"))
    entries[KVM_CPUID_SIGNATURE, 0] = CpuidEntry(
        KVM_CPUID_SIGNATURE, 0, False, KVM_CPUID_FEATURES, ebx, ecx, edx
    )
    features = CpuidEntry(KVM_CPUID_FEATURES, 0, False, 0, 0, 0, 0)
    entries.setdefault((KVM_CPUID_FEATURES, 0), features)


def _describe_topology(entries: _Entries, vcpu_id: int, vcpu_count: int) -> None:
    """One package of ``vcpu_count`` cores, one thread each: KVM leaves the host's in place."""
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
    """``entry`` with its topology fields, if it has any, saying what the guest has."""
    cores = vcpu_count - 1
    if entry.function in (4, 0x8000_001D) and entry.eax & 0x1F:  # a cache: Intel's, AMD's leaf
        level = entry.eax >> 5 & 7
        sharers = cores if level == _SHARED_CACHE_LEVEL else 0
        eax = entry.eax & 0x3FFF | min(sharers, 0xFFF) << 14
        if entry.function == 4:
            eax |= min(cores, 63) << 26
        return entry.replace(eax=eax)
    if entry.function == 0x8000_0008:
        return entry.replace(ecx=entry.ecx & ~0xF0FF | core_bits << 12 | min(cores, 255))
    if entry.function == 0x8000_001E:
        return entry.replace(eax=vcpu_id, ebx=vcpu_id & 0xFF, ecx=0)
    return entry
