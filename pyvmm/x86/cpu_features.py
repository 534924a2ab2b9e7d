"""CPU features: where CPUID says them, and what rests on what.

Names are those of /proc/cpuinfo.  Leaves and bits: Intel SDM volume 2, CPUID; AMD64 APM volume 3,
appendix E; KVM's own leaves: Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from pyvmm.kvm.abi import KVM_CPUID_FEATURES

Word = tuple[int, int, str]
"""A leaf, its index and the register in it."""

# Names by bit, from bit 0; "-" is a bit without a name.  A feature may be in several words.
WORDS: Mapping[Word, str] = MappingProxyType({
    (1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov"
        " pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm"
        " - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx"
        " f16c rdrand hypervisor"
    ),
    (6, 0, "eax"): "- - arat",
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
DEPENDENTS: Mapping[str, str] = MappingProxyType({
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

# What a 64-bit Linux is built to rely on (arch/x86/include/asm/required-features.h), its system
# calls and its interrupts.  It does not look for most of them, and nor do programs.
ESSENTIAL = (
    "fpu", "msr", "pae", "cx8", "apic", "cmov", "fxsr", "sse", "sse2", "syscall", "lm",
)  # fmt: skip

# Leaves that describe one feature, and go with it.
LEAVES: Mapping[str, frozenset[int]] = MappingProxyType({
    "xsave": frozenset({0xD}),
    "sgx": frozenset({0x12}),
    "intel_pt": frozenset({0x14}),
    "amx_tile": frozenset({0x1D, 0x1E}),
    "svm": frozenset({0x8000_000A}),
    "topoext": frozenset({0x8000_001D, 0x8000_001E}),
})

# The state components of leaf 0xD (bits of XCR0 and IA32_XSS) that belong to a feature.
COMPONENTS: Mapping[str, int] = MappingProxyType(
    {"avx": 1 << 2, "mpx": 3 << 3, "avx512f": 7 << 5, "pku": 1 << 9, "amx_tile": 3 << 17}
)


def _positions() -> dict[str, list[tuple[Word, int]]]:
    found: dict[str, list[tuple[Word, int]]] = {}
    for word, names in WORDS.items():
        for bit, name in enumerate(names.split()):
            if name != "-":
                found.setdefault(name, []).append((word, bit))
    return found


POSITIONS: Mapping[str, list[tuple[Word, int]]] = MappingProxyType(_positions())


def with_dependents(names: Iterable[str]) -> frozenset[str]:
    """``names`` and all that cannot be without them."""
    closed: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in closed:
            closed.add(name)
            left += DEPENDENTS.get(name, "").split()
    return frozenset(closed)


def bit_name(word: Word, bit: int) -> str:
    """What to call ``bit`` of a register of CPUID in a message."""
    function, index, register = word
    names = WORDS.get(word, "").split()
    if bit < len(names) and names[bit] != "-":
        return names[bit]
    subleaf = f" subleaf {index:#x}" if index else ""
    return f"leaf {function:#x}{subleaf} {register} bit {bit}"
