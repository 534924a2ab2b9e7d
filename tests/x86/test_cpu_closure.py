"""No guest finds a feature without what it rests on, whatever this host's KVM offers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.kvm.cpuid_entry import CpuidEntry
from pyvmm.x86.cpu_features import (
    DEPENDENTS,
    ESSENTIAL,
    LEAVES,
    POSITIONS,
    WORDS,
    Word,
    with_dependents,
)
from pyvmm.x86.cpu_mask import CpuModel, RegisterMask
from pyvmm.x86.cpu_model import parse_cpu_option
from pyvmm.x86.cpuid import build
from tests.support.cpu_needs import NEEDS

ALL = 0xFFFF_FFFF
Bit = tuple[int, int, str, int]
Table = dict[tuple[int, int], CpuidEntry]

OWN_LEAVES = {
    "xsave": 0xD, "sgx": 0x12, "intel_pt": 0x14, "keylocker": 0x19, "amx_tile": 0x1E,
    "avx10": 0x24, "svm": 0x8000_000A,
}  # fmt: skip
# The components of leaf 0xD, and the features of which one must be there.
OWNERS = {
    2: "avx", 3: "mpx", 4: "mpx", 5: "avx512f avx10", 6: "avx512f avx10", 7: "avx512f avx10",
    9: "pku", 11: "shstk ibt", 12: "shstk ibt", 17: "amx_tile", 18: "amx_tile", 19: "apx",
}  # fmt: skip
USER, SUPERVISOR = 0xE02FF, 0x1800
SIZES = {2: (0x100, 0x240), 3: (64, 0x3C0), 4: (64, 0x400), 5: (64, 0x440), 6: (512, 0x480),
         7: (1024, 0x680), 9: (8, 0xA80), 17: (64, 0xAC0), 18: (8192, 0xB00), 19: (128, 0x3C0)}


def full(user: int = USER, supervisor: int = SUPERVISOR) -> list[CpuidEntry]:
    """A KVM that offers every named bit, and the state components of ``user``, ``supervisor``."""
    words: dict[tuple[int, int], dict[str, int]] = {}
    for function, index, register in WORDS:
        words.setdefault((function, index), {})[register] = ALL
    entries = {
        key: CpuidEntry(*key, key[0] in (7, 0xD, 0x12, 0x1E, 0x24), *(
            registers.get(name, 0) for name in ("eax", "ebx", "ecx", "edx")
        ))
        for key, registers in words.items()
    }  # fmt: skip
    entries[0xD, 0] = CpuidEntry(0xD, 0, True, user, 0x2B00, 0x2B00, 0)
    entries[0xD, 1] = entries[0xD, 1].replace(ecx=supervisor)
    for index in range(2, 20):
        if (user | supervisor) >> index & 1:
            size, offset = SIZES.get(index, (16, 0))
            entries[0xD, index] = CpuidEntry(0xD, index, True, size, offset, 0, 0)
    for function in (0xF, 0x10, 0x14, 0x19, 0x1B, 0x1C, 0x1D, 0x20, 0x23, 0x8000_001B,
                     0x8000_001C, 0x8000_001D, 0x8000_001E):
        entries[function, 0] = CpuidEntry(function, 0, True, 1, 2, 3, 4)
    entries[7, 0] = entries[7, 0].replace(eax=2)
    entries[0x8000_0000, 0] = CpuidEntry(0x8000_0000, 0, False, 0x8000_0022, 0, 0, 0)
    entries[0, 0] = CpuidEntry(0, 0, False, 0x24, 0, 0, 0)
    sizes = entries[0x8000_0008, 0]
    entries[0x8000_0008, 0] = sizes.replace(eax=57 << 8 | 46)
    return list(entries.values())


def table(entries: Iterable[CpuidEntry]) -> Table:
    return {(entry.function, entry.index): entry for entry in entries}


def value(guest: Table, word: Word) -> int:
    entry = guest.get(word[:2])
    return getattr(entry, word[2]) if entry else 0


def has(guest: Table, name: str) -> bool:
    word, bit = POSITIONS[name][0]
    bits = 1 << bit | 8 if name == "kvmclock" else 1 << bit  # it has a second, newer bit
    return bool(value(guest, word) & bits)


def check_closed(guest: Table) -> None:
    """Nothing contradicts itself in what ``guest`` finds."""
    for name, needed in NEEDS.items():
        if any(value(guest, word) >> bit & 1 for word, bit in POSITIONS[name]):
            assert [one for one in needed if not has(guest, one)] == [], name
    for name, leaf in OWN_LEAVES.items():
        assert has(guest, name) or not any(function == leaf for function, _ in guest), name
    head, more = guest.get((0xD, 0)), guest.get((0xD, 1))
    assert (head is not None) == has(guest, "xsave")
    if head is not None:
        supervisor = more.ecx if more else 0
        assert supervisor == 0 or has(guest, "xsaves")
        for index, owners in OWNERS.items():
            if (head.eax | supervisor) >> index & 1:
                assert any(has(guest, owner) for owner in owners.split()), index
        for name, bits in (("avx", 4), ("avx512f", 0xE0), ("pku", 1 << 9)):
            assert not has(guest, name) or head.eax & bits == bits, name
        described = {index for function, index in guest if function == 0xD and index > 1}
        assert all((head.eax | supervisor) >> index & 1 for index in described)
    linear = value(guest, (0x8000_0008, 0, "eax")) >> 8 & 0xFF
    assert linear <= 48 or has(guest, "la57")


def check_less(guest: Table, offered: list[CpuidEntry]) -> None:
    """``guest`` has no feature that is not ``offered``, but for the one that KVM never names."""
    before = table(offered)
    for word in WORDS:
        added = value(guest, word) & ~value(before, word)
        assert added == (1 << 31 if word == (1, 0, "ecx") else 0) & added, word


def test_fault_29_the_labs_cpu_without_xsave_has_no_avx() -> None:
    # avx f16c fma; avx2 mpx; pku vaes vpclmulqdq: as QEMU's -cpu max,-xsave left them.
    basic = 1 << 28 | 1 << 29 | 1 << 12
    more = {"ebx": 1 << 5 | 1 << 14, "ecx": 1 << 3 | 1 << 9 | 1 << 10}
    entries = [
        CpuidEntry(0, 0, False, 0xD, 0, 0, 0),
        CpuidEntry(1, 0, False, 0, 0, basic | 1 << 25 | 1 << 1 | 1, 0x078B_FBFF),
        CpuidEntry(7, 0, True, 0, more["ebx"] | 1 << 8, more["ecx"] | 1 << 2, 0),
        CpuidEntry(0xD, 0, True, 0, 0, 0, 0),
        CpuidEntry(0x8000_0001, 0, False, 0, 0, 0, 0x2C10_0800),
    ]
    guest = table(build(entries, parse_cpu_option("host"), 0))
    assert guest[1, 0].ecx == 1 << 31 | 1 << 25 | 1 << 1 | 1, "aes, pclmulqdq and pni stay"
    assert (guest[7, 0].ebx, guest[7, 0].ecx) == (1 << 8, 1 << 2), "bmi2 and umip stay"
    assert (0xD, 0) not in guest


def test_all_of_a_closed_cpu_is_kept() -> None:
    entries = [e.replace(eax=e.eax & ~4) if e.function == 0x8000_0001 else e for e in full()]
    wanted = parse_cpu_option("host,+svm,+vmx")
    guest = table(build(entries, wanted, 0))
    for word in WORDS:
        kept = value(guest, word) & ~(1 << 28 if word == (1, 0, "edx") else 0)  # ht: one vCPU
        assert kept == value(table(entries), word) & ~(1 << 28 if word == (1, 0, "edx") else 0)
    assert guest[0xD, 0].eax == USER
    assert guest[0xD, 1].ecx == SUPERVISOR


@st.composite
def kvms(draw: st.DrawFn) -> list[CpuidEntry]:
    """Any part of what a KVM can offer; mostly much of it, so that long chains are there."""
    user = USER & draw(st.integers(0, ALL))
    entries = []
    for entry in full(user, SUPERVISOR & draw(st.integers(0, ALL))):
        masks = {
            register: getattr(entry, register)
            & draw(st.sampled_from([ALL, ALL, 0]) | st.integers(0, ALL))
            for function, index, register in WORDS
            if (function, index) == (entry.function, entry.index)
        } if draw(st.booleans()) else {}
        if entry.function in (0, 1) or draw(st.integers(0, 9)):
            entries.append(entry.replace(**masks))
    return entries


@given(kvms())
def test_whatever_kvm_offers_the_guest_finds_a_closed_part(offered: list[CpuidEntry]) -> None:
    model = CpuModel()
    built = build(offered, model, 0)
    guest = table(built)
    check_closed(guest)
    check_less(guest, offered)
    assert table(build(built, model, 0)) == guest, "a second time there is nothing to take away"


@given(kvms(), st.sets(st.sampled_from(sorted(POSITIONS)), max_size=3), st.booleans())
def test_whatever_a_user_takes_away(
    offered: list[CpuidEntry], removed: set[str], nested: bool
) -> None:
    model = CpuModel(removed=frozenset(removed))
    if nested:
        model = model.replace(required=frozenset({"svm"}))
    try:
        guest = table(build(offered, model, 0))
    except ConfigError:
        return  # what no Linux runs without, or an svm that is not there
    check_closed(guest)
    check_less(guest, offered)
    for name in removed - {"ht", "hypervisor"}:
        assert not any(value(guest, word) >> bit & 1 for word, bit in POSITIONS[name]), name


@given(kvms(), st.lists(st.tuples(st.sampled_from(sorted(WORDS)), st.integers(0, ALL)), max_size=4))
def test_whatever_a_file_masks(
    offered: list[CpuidEntry], masks: list[tuple[Word, int]]
) -> None:
    model = CpuModel(masks=tuple(RegisterMask(word=word, keep=keep) for word, keep in masks))
    try:
        guest = table(build(offered, model, 0))
    except ConfigError:
        return
    check_closed(guest)
    check_less(guest, offered)


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_each_feature_can_go_from_a_full_cpu(name: str) -> None:
    model = parse_cpu_option(f"host,-{name}")
    if with_dependents([name]) & set(ESSENTIAL):
        with pytest.raises(ConfigError, match="without which no 64-bit Linux runs"):
            build(full(), model, 0)
        return
    guest = table(build(full(), model, 0))
    check_closed(guest)
    assert not has(guest, name)


def test_linear_addresses_are_of_48_bits_without_la57() -> None:
    with_la57 = table(build(full(), parse_cpu_option("host"), 0))
    without = table(build(full(), parse_cpu_option("host,-la57"), 0))
    sizes = [value(guest, (0x8000_0008, 0, "eax")) for guest in (with_la57, without)]
    assert sizes == [57 << 8 | 46, 48 << 8 | 46]


# Nested virtualization

SVM, VMX = (0x8000_0001, 0, "ecx", 2), (1, 0, "ecx", 5)


def is_set(guest: Table, bit: Bit) -> bool:
    return bool(value(guest, bit[:3]) >> bit[3] & 1)


def template(folder: Path, bitmap: str, options: str = "") -> str:
    """A --cpu that keeps, asks for or clears svm, as ``bitmap`` has it."""
    path = folder / "cpu.json"
    path.write_text(json.dumps({"cpuid_modifiers": [{
        "leaf": "0x80000001", "subleaf": "0x0",
        "modifiers": [{"register": "ecx", "bitmap": bitmap}],
    }]}))  # fmt: skip
    return f"{path}{options}"


def test_fault_29_svm_and_vmx_are_off_unless_asked_for(tmp_path: Path) -> None:
    for option, svm, vmx in [
        ("host", False, False), ("base", False, False), ("host,-aes", False, False),
        ("host,+svm", True, False), ("host,+vmx", False, True), ("host,+svm,+vmx", True, True),
        ("host,+npt", True, False),
        (template(tmp_path, "0bx"), False, False), (template(tmp_path, "0b0xx"), False, False),
    ]:  # fmt: skip
        guest = table(build(full(), parse_cpu_option(option), 0))
        assert (is_set(guest, SVM), is_set(guest, VMX)) == (svm, vmx), option
        assert ((0x8000_000A, 0) in guest) == svm, option
        assert ((0x8000_001F, 0) in guest) == svm, option
        check_closed(guest)


def test_a_file_may_ask_for_svm(tmp_path: Path) -> None:
    guest = table(build(full(), parse_cpu_option(template(tmp_path, "0b1xx")), 0))
    assert is_set(guest, SVM)
    guest = table(build(full(), parse_cpu_option(template(tmp_path, "0bx", ",+svm")), 0))
    assert is_set(guest, SVM)


def test_svm_where_there_is_none_is_refused_in_a_line(tmp_path: Path) -> None:
    poor = [e.replace(ecx=e.ecx & ~4) if e.function == 0x8000_0001 else e for e in full()]
    for option in ("host,+svm", "host,+npt"):
        with pytest.raises(ConfigError) as caught:
            build(poor, parse_cpu_option(option), 0)
        name = option.partition("+")[2]
        assert str(caught.value) == f"--cpu: +{name}: this host's KVM does not offer it to guests"
    with pytest.raises(ConfigError, match=r"--cpu .*: this host's KVM does not offer svm$"):
        build(poor, parse_cpu_option(template(tmp_path, "0b1xx")), 0)
    with pytest.raises(ConfigError, match=r"--cpu: \+svm: the model base leaves it out"):
        build(full(), parse_cpu_option("base,+svm"), 0)


# The tables


def test_a_feature_stands_in_front_of_what_rests_on_it() -> None:
    order = list(DEPENDENTS)
    for name, dependents in DEPENDENTS.items():
        for one in dependents.split():
            assert one in POSITIONS, one
            if one in order:
                assert order.index(one) > order.index(name), (name, one)
    assert set(LEAVES) <= set(POSITIONS)


@pytest.mark.parametrize(("name", "word", "bit"), [
    ("keylocker", (7, 0, "ecx"), 23), ("bus_lock_detect", (7, 0, "ecx"), 24),
    ("pks", (7, 0, "ecx"), 31), ("lass", (7, 1, "eax"), 6), ("fred", (7, 1, "eax"), 17),
    ("wrmsrns", (7, 1, "eax"), 19), ("amx_fp16", (7, 1, "eax"), 21), ("lam", (7, 1, "eax"), 26),
    ("avx_ifma", (7, 1, "eax"), 23), ("movrs", (7, 1, "eax"), 31),
    ("avx_vnni_int8", (7, 1, "edx"), 4), ("amx_complex", (7, 1, "edx"), 8),
    ("prefetchiti", (7, 1, "edx"), 14), ("avx10", (7, 1, "edx"), 19), ("apx", (7, 1, "edx"), 21),
    ("mcdt_no", (7, 2, "edx"), 5), ("sgx_edeccssa", (0x12, 0, "eax"), 11),
    ("amx_movrs", (0x1E, 1, "eax"), 8), ("avx10_512", (0x24, 0, "ebx"), 18),
    ("smca", (0x8000_0007, 0, "ebx"), 3), ("invlpgb", (0x8000_0008, 0, "ebx"), 3),
    ("ibpb", (0x8000_0008, 0, "ebx"), 12), ("amd_stibp_always_on", (0x8000_0008, 0, "ebx"), 17),
    ("amd_ssbd", (0x8000_0008, 0, "ebx"), 24), ("brs", (0x8000_0008, 0, "ebx"), 31),
    ("avic", (0x8000_000A, 0, "edx"), 13), ("vgif", (0x8000_000A, 0, "edx"), 16),
    ("x2avic", (0x8000_000A, 0, "edx"), 18), ("v_spec_ctrl", (0x8000_000A, 0, "edx"), 20),
    ("vnmi", (0x8000_000A, 0, "edx"), 25), ("svme_addr_chk", (0x8000_000A, 0, "edx"), 28),
    ("sev_es", (0x8000_001F, 0, "eax"), 3), ("debug_swap", (0x8000_001F, 0, "eax"), 14),
    ("null_sel_clr_base", (0x8000_0021, 0, "eax"), 6), ("autoibrs", (0x8000_0021, 0, "eax"), 8),
    ("sbpb", (0x8000_0021, 0, "eax"), 27), ("srso_no", (0x8000_0021, 0, "eax"), 29),
    ("kvm_migration_control", (0x4000_0001, 0, "eax"), 17),
    ("kvmclock_stable", (0x4000_0001, 0, "eax"), 24),
])  # fmt: skip
def test_names_stand_where_the_manuals_have_them(name: str, word: Word, bit: int) -> None:
    assert POSITIONS[name][0] == (word, bit)
