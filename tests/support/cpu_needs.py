"""What rests on what among CPU features, as the manuals and Linux's cpuid-deps.c have it.

Written down here a second time, and the other way about than in pyvmm.
"""

from __future__ import annotations

from collections.abc import Collection

NEEDS = {
    line.partition(":")[0].strip(): line.partition(":")[2].split()
    for line in """
    xsave: fxsr sse2
    avx: xsave
    avx2: avx
    fma: avx
    f16c: avx
    fma4: avx
    xop: avx
    vaes: avx aes
    vpclmulqdq: avx pclmulqdq
    avx_vnni: avx
    avx_ifma: avx
    avx_ne_convert: avx
    gfni: sse2
    sha_ni: sse2
    aes: sse2
    pclmulqdq: sse2
    sse2: sse
    sse: fxsr
    fxsr: fpu
    mmxext: mmx
    xsaveopt: xsave
    xsavec: xsave
    xsaves: xsave
    xgetbv1: xsave
    xfd: xsaves xgetbv1
    mpx: xsave
    pku: xsave
    ospke: pku
    apx: xsave
    avx512f: avx avx2
    avx512dq: avx512f
    avx512ifma: avx512f
    avx512cd: avx512f
    avx512bw: avx512f
    avx512vl: avx512f
    avx512vbmi: avx512bw
    avx512_vbmi2: avx512bw avx512vl
    avx512_vnni: avx512vl
    avx512_bitalg: avx512bw avx512vl
    avx512_bf16: avx512bw avx512vl
    avx512_fp16: avx512bw
    avx512_vp2intersect: avx512vl
    avx512_vpopcntdq: avx512f
    avx512_4vnniw: avx512f
    avx512_4fmaps: avx512f
    avx10: avx2
    amx_tile: xfd xsave
    amx_bf16: amx_tile
    amx_int8: amx_tile
    amx_fp16: amx_tile
    amx_complex: amx_tile
    shstk: xsaves
    enqcmd: xsaves
    la57: lm
    pcid: lm
    invpcid: pcid
    lam: lm
    lass: smap
    fred: lm lkgs wrmsrns
    fsrm: erms
    sgx_lc: sgx
    spec_ctrl_ssbd: spec_ctrl
    bhi_ctrl: spec_ctrl
    x2apic: apic
    tsc_deadline_timer: apic tsc
    rdtscp: tsc
    mca: mce
    npt: svm
    vgif: svm
    vnmi: vgif
    x2avic: avic
    sev: svm
    sev_es: sev
    sev_snp: sev_es
    skinit: svm
    kvmclock_stable: kvmclock
    kvm_asyncpf_int: kvm_asyncpf
    kvm_pv_tlb_flush: kvm_steal_time
    """.strip().splitlines()
}
"""By feature, all that it needs: "a: b c" is a, which needs both b and c."""


def contradictions(flags: Collection[str]) -> list[str]:
    """Return what ``flags``, as in /proc/cpuinfo, have without what it rests on."""
    return [
        f"{name} without {one}"
        for name in flags if name in NEEDS for one in NEEDS[name] if one not in flags
    ]
