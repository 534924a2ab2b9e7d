"""CPU models, which ``--cpu`` chooses.  docs/cpu-models.md has the words for users.

A model takes features away from those that this host's KVM offers.  It may also demand some of
them.  ``pyvmm.x86.cpuid`` applies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pyvmm.errors import ConfigError
from pyvmm.kvm.abi import KVM_CPUID_FEATURES, KVM_CPUID_SIGNATURE
from pyvmm.x86.cpu_features import POSITIONS, WORDS, Word, with_dependents
from pyvmm.x86.cpu_mask import OPTION, CpuModel, RegisterMask

_TEMPLATE_SUFFIX = ".json"


def parse_cpu_option(text: str) -> CpuModel:
    """Parse ``MODEL[,-feature][,+feature]...``; MODEL is ``host``, ``base`` or a file ``*.json``.

    A comma in the file's name is written twice.  ConfigError names ``--cpu`` and the mistake, also
    one in the file.
    """
    name, *changes = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    functions: frozenset[int] | None = None
    masks: tuple[RegisterMask, ...] = ()
    if name == "base":
        functions, masks = _BASE_FUNCTIONS, _base_masks()
    elif name.endswith(_TEMPLATE_SUFFIX):
        from pyvmm.x86.cpu_template import read_template  # few need it, and it imports json

        masks = read_template(name)
    elif name != "host":
        raise ConfigError(
            OPTION,
            f"unknown model {name!r}; there are 'host', 'base' and files whose name ends in "
            f"{_TEMPLATE_SUFFIX}, all as in 'host,-xsave'",
        )
    removed, required = _parse_changes(changes)
    return CpuModel(
        name=name, functions=functions, masks=masks, removed=removed, required=required
    )


def _parse_changes(changes: list[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the features that ``-feature`` removes and those that ``+feature`` requires."""
    chosen: dict[str, set[str]] = {"-": set(), "+": set()}
    for change in changes:
        sign, name = change[:1], change[1:]
        if sign not in chosen:
            raise ConfigError(OPTION, f"{change!r} is neither '-feature' nor '+feature'")
        if name not in POSITIONS:
            from pyvmm.startup.mistakes import did_you_mean

            raise ConfigError(
                OPTION,
                f"unknown feature {name!r}{did_you_mean(name, sorted(POSITIONS))} (names are those "
                "of /proc/cpuinfo; docs/cpu-models.md)",
            )
        chosen[sign].add(name)
    both = with_dependents(chosen["-"]) & chosen["+"]
    if both:
        raise ConfigError(OPTION, f"{min(both)!r} is both wanted and removed")
    return frozenset(chosen["-"]), frozenset(chosen["+"])


# ---- base: x86-64-v2 as the psABI defines it, and what a kernel needs beside it ------------------

# Vendor and model, caches, topology, address sizes, KVM's own leaves.
_BASE_FUNCTIONS = frozenset({
    0, 1, 2, 4, 6, 0xB, KVM_CPUID_SIGNATURE, KVM_CPUID_FEATURES,
    *range(0x8000_0000, 0x8000_0009), 0x8000_001D, 0x8000_001E,
})  # fmt: skip

# By register: the features that must be there, and those that the host may or may not have.  The
# latter are those that KVM emulates, that describe (topology, clocks), or that every 64-bit
# processor has.  AMD repeats many bits of leaf 1 in leaf 0x80000001.
_COMMON = "vme de pse tsc msr pae mce apic mtrr pge mca pat pse36"
_BASE_FEATURES: Mapping[Word, tuple[str, str]] = MappingProxyType({
    (1, 0, "edx"): ("fpu cx8 cmov mmx fxsr sse sse2", f"{_COMMON} sep clflush ht"),
    (1, 0, "ecx"): (
        "pni ssse3 cx16 sse4_1 sse4_2 popcnt", "x2apic tsc_deadline_timer hypervisor",
    ),
    (6, 0, "eax"): ("", "arat"),
    (0x8000_0001, 0, "edx"): ("syscall nx lm", f"{_COMMON} fpu cx8 cmov mmx fxsr"),
    (0x8000_0001, 0, "ecx"): ("lahf_lm", "cmp_legacy topoext"),
    (0x8000_0007, 0, "edx"): ("", "constant_tsc"),
})  # fmt: skip

# Registers of the leaves above in which every bit is a feature, and none of them is in the base.
_BASE_CLEARED: tuple[Word, ...] = (
    (6, 0, "ebx"), (6, 0, "ecx"), (6, 0, "edx"),
    (0x8000_0007, 0, "eax"), (0x8000_0007, 0, "ebx"), (0x8000_0007, 0, "ecx"),
    (0x8000_0008, 0, "ebx"), (0x8000_0008, 0, "edx"),
)  # fmt: skip


def _base_masks() -> tuple[RegisterMask, ...]:
    masks = []
    for word, (needed, welcome) in _BASE_FEATURES.items():
        demand = _bits(word, needed)
        masks.append(RegisterMask(word=word, keep=demand | _bits(word, welcome), demand=demand))
    masks += [RegisterMask(word=word, keep=0) for word in _BASE_CLEARED]
    return tuple(masks)


def _bits(word: Word, names: str) -> int:
    """Return the bits of a register that have one of ``names``."""
    wanted = set(names.split())
    return sum(1 << bit for bit, name in enumerate(WORDS[word].split()) if name in wanted)
