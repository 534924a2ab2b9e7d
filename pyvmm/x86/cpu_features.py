"""CPU features: the bits by which CPUID tells them, and the features that need them.

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
        " avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid keylocker"
        " bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks"
    ),
    (7, 0, "edx"): (
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear"
        " - - - serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16"
        " amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities"
        " spec_ctrl_ssbd"
    ),
    (7, 1, "eax"): (
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc"
        " - - - - fred lkgs wrmsrns - amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs"
    ),
    (7, 1, "edx"): (
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti"
        " user_msr - - cet_sss avx10 - apx"
    ),
    (7, 2, "edx"): "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x12, 0, "eax"): "sgx1 sgx2 - - - - - - - - - sgx_edeccssa",
    (0x1E, 1, "eax"): (
        "amx_int8 amx_bf16 amx_complex amx_fp16 amx_fp8 - amx_tf32 amx_avx512 amx_movrs"
    ),
    (0x24, 0, "ebx"): "- - - - - - - - - - - - - - - - avx10_128 avx10_256 avx10_512",
    (0x8000_0001, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov"
        " pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
    ),
    (0x8000_0001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs"
        " xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext"
        " ptsc perfctr_llc mwaitx"
    ),
    (0x8000_0007, 0, "ebx"): "overflow_recov succor - smca",
    (0x8000_0007, 0, "edx"): "- - - - - - - - constant_tsc",
    (0x8000_0008, 0, "ebx"): (
        "clzero irperf xsaveerptr invlpgb rdpru - - - - wbnoinvd - - ibpb - ibrs amd_stibp -"
        " amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd"
        " btc_no amd_ibpb_ret brs"
    ),
    (0x8000_000A, 0, "edx"): (
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter"
        " - pfthreshold avic - v_vmsave_vmload vgif - x2avic - v_spec_ctrl - - - - vnmi - -"
        " svme_addr_chk"
    ),
    (0x8000_001F, 0, "eax"): "sme sev - sev_es sev_snp - - - - - - - - - debug_swap",
    (0x8000_0021, 0, "eax"): (
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - -"
        " - - - - - - - - - - - - - - sbpb ibpb_brtype srso_no"
    ),
    (0x8000_0022, 0, "eax"): "perfmon_v2 amd_lbr_v2",
    (KVM_CPUID_FEATURES, 0, "eax"): (
        "kvmclock kvm_nopiodelay kvm_mmu kvmclock kvm_asyncpf kvm_steal_time kvm_pv_eoi"
        " kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control"
        " kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id"
        " kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable"
    ),
})  # fmt: skip

# A feature and those that make no sense without it.  Linux: arch/x86/kernel/cpu/cpuid-deps.c; QEMU:
# feature_dependencies in target/i386/cpu.c; KVM: kvm_set_cpu_caps in arch/x86/kvm/cpuid.c.  Each
# feature stands before those that depend on it.
DEPENDENTS: Mapping[str, str] = MappingProxyType({
    "fpu": "fxsr mmx",
    "mmx": "mmxext 3dnow",
    "3dnow": "3dnowext",
    "fxsr": "sse fxsr_opt",
    "sse": "sse2 misalignsse",
    "sse2": "pni pclmulqdq aes sha_ni gfni xsave",
    "pni": "ssse3 sse4a",
    "ssse3": "sse4_1",
    "sse4_1": "sse4_2",
    "aes": "vaes keylocker",
    "pclmulqdq": "vpclmulqdq",
    "xsave": (
        "osxsave xsaveopt xsavec xsaves xgetbv1 xfd xsaveerptr avx mpx pku amx_tile apx lwp"
    ),
    "xgetbv1": "xfd",
    "xsaves": "xfd shstk uintr enqcmd",
    "xfd": "amx_tile",
    "avx": (
        "avx2 fma f16c fma4 xop vaes vpclmulqdq avx_vnni avx_vnni_int8 avx_vnni_int16 avx_ifma"
        " avx_ne_convert sha512 sm3 sm4"
    ),
    "avx2": "avx512f avx10",
    "avx512f": (
        "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512_vnni"
        " avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect"
    ),
    "avx512bw": "avx512vbmi avx512_vbmi2 avx512_bitalg avx512_bf16 avx512_fp16",
    "avx512vl": "avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vp2intersect avx512_bf16",
    "avx10": "avx10_128",
    "avx10_128": "avx10_256",
    "avx10_256": "avx10_512",
    "pku": "ospke",
    "amx_tile": (
        "amx_bf16 amx_int8 amx_fp16 amx_complex amx_fp8 amx_tf32 amx_avx512 amx_movrs"
    ),
    "erms": "fsrm fzrm fsrs fsrc",
    "pse": "pse36",
    "pae": "nx lm",
    "lm": "cx16 fsgsbase la57 lahf_lm lam pcid pdpe1gb fred",
    "pcid": "invpcid invlpgb",
    "smap": "lass",
    "lkgs": "fred",
    "wrmsrns": "fred",
    "apic": "x2apic extapic tsc_deadline_timer",
    "tsc": "rdtscp tsc_adjust tsc_deadline_timer constant_tsc",
    "mce": "mca",
    "mca": "overflow_recov succor smca",
    "dts": "dtes64 ds_cpl",
    "rtm": "tsxldtrk",
    "perfctr_core": "perfmon_v2",
    "spec_ctrl": "spec_ctrl_ssbd intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl",
    "amd_stibp": "amd_stibp_always_on",
    "svm": (
        "skinit npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists"
        " pausefilter pfthreshold avic v_vmsave_vmload vgif v_spec_ctrl svme_addr_chk sme sev"
    ),
    "avic": "x2avic",
    "vgif": "vnmi",
    "sev": "sev_es",
    "sev_es": "sev_snp debug_swap",
    "sgx": "sgx_lc sgx1",
    "sgx1": "sgx2 sgx_edeccssa",
    "kvmclock": "kvmclock_stable",
    "kvm_asyncpf": "kvm_asyncpf_vmexit kvm_asyncpf_int",
    "kvm_steal_time": "kvm_pv_tlb_flush kvm_pv_sched_yield",
})  # fmt: skip

# Virtualization inside the guest, only on request: nobody saves its state, and it is a large attack
# surface.
NESTED = frozenset({"svm", "vmx"})

# The features that every 64-bit Linux is built to rely on
# (arch/x86/include/asm/required-features.h), with its system calls and its interrupts.  Neither
# Linux nor programs look for most of them.
ESSENTIAL = (
    "fpu", "msr", "pae", "cx8", "apic", "cmov", "fxsr", "sse", "sse2", "syscall", "lm",
)  # fmt: skip

# Leaves that describe one feature, and are removed with it.
LEAVES: Mapping[str, frozenset[int]] = MappingProxyType({
    "xsave": frozenset({0xD}),
    "cqm": frozenset({0xF}),
    "rdt_a": frozenset({0x10}),
    "sgx": frozenset({0x12}),
    "intel_pt": frozenset({0x14}),
    "keylocker": frozenset({0x19}),
    "pconfig": frozenset({0x1B}),
    "arch_lbr": frozenset({0x1C}),
    "amx_tile": frozenset({0x1D, 0x1E}),
    "hreset": frozenset({0x20}),
    "arch_perfmon_ext": frozenset({0x23}),
    "avx10": frozenset({0x24}),
    "svm": frozenset({0x8000_000A, 0x8000_001F}),
    "ibs": frozenset({0x8000_001B}),
    "lwp": frozenset({0x8000_001C}),
    "topoext": frozenset({0x8000_001D, 0x8000_001E}),
})

# State components of leaf 0xD (bits of XCR0 and IA32_XSS) and their features: one is enough.
COMPONENTS: tuple[tuple[int, str], ...] = (
    (1 << 2, "avx"), (3 << 3, "mpx"), (7 << 5, "avx512f avx10"), (1 << 8, "intel_pt"),
    (1 << 9, "pku"), (1 << 10, "enqcmd"), (3 << 11, "shstk ibt"), (1 << 14, "uintr"),
    (1 << 15, "arch_lbr"), (3 << 17, "amx_tile"), (1 << 19, "apx"), (1 << 62, "lwp"),
)  # fmt: skip

# Features that code uses by CPUID's word without asking XCR0, as Linux does, and their components.
STATEFUL: Mapping[str, int] = MappingProxyType({"avx": 1 << 2, "avx512f": 7 << 5, "pku": 1 << 9})


def _positions() -> dict[str, list[tuple[Word, int]]]:
    found: dict[str, list[tuple[Word, int]]] = {}
    for word, names in WORDS.items():
        for bit, name in enumerate(names.split()):
            if name != "-":
                found.setdefault(name, []).append((word, bit))
    return found


POSITIONS: Mapping[str, list[tuple[Word, int]]] = MappingProxyType(_positions())

# Features that a second leaf repeats.
REPEATED = tuple(name for name, found in POSITIONS.items() if found[0][0] != found[-1][0])


def with_dependents(names: Iterable[str]) -> frozenset[str]:
    """Return ``names`` and all features that cannot be without them."""
    closed: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in closed:
            closed.add(name)
            left += DEPENDENTS.get(name, "").split()
    return frozenset(closed)


def bit_name(word: Word, bit: int) -> str:
    """Return a name for ``bit`` of a register of CPUID, for messages."""
    function, index, register = word
    names = WORDS.get(word, "").split()
    if bit < len(names) and names[bit] != "-":
        return names[bit]
    subleaf = f" subleaf {index:#x}" if index else ""
    return f"leaf {function:#x}{subleaf} {register} bit {bit}"
