"""--cpu, and the CPUID that comes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.kvm.cpuid_entry import CpuidEntry
from pyvmm.kvm.handles import Kvm
from pyvmm.x86.cpuid import CpuModel, build, parse_cpu_option

ALL = 0xFFFF_FFFF
Key = tuple[int, int]

# A host with everything: each word full, extended state as an AVX-512 host has it.
SUPPORTED = [
    CpuidEntry(0, 0, False, 0xD, 0, 0, 0),
    CpuidEntry(1, 0, False, 0xB00F21, 0x01020800, ALL & ~(1 << 31 | 1 << 24), ALL),
    CpuidEntry(4, 0, True, 0x1C00_4121, 1, 2, 3),
    CpuidEntry(4, 3, True, 0x1C03_C163, 1, 2, 3),
    CpuidEntry(4, 4, True, 0, 0, 0, 0),
    CpuidEntry(7, 0, True, 1, ALL, ALL, ALL),
    CpuidEntry(7, 1, True, ALL, 0, 0, 0),
    CpuidEntry(0xB, 0, True, 1, 2, 0x100, 9),
    CpuidEntry(0xB, 1, True, 4, 16, 0x201, 9),
    CpuidEntry(0xD, 0, True, 0x2E7, 0x988, 0x988, 0),
    CpuidEntry(0xD, 1, True, ALL, 0x988, 0, 0),
    CpuidEntry(0xD, 2, True, 0x100, 0x240, 0, 0),
    CpuidEntry(0xD, 5, True, 0x40, 0x340, 0, 0),
    CpuidEntry(0xD, 6, True, 0x200, 0x380, 0, 0),
    CpuidEntry(0xD, 7, True, 0x400, 0x580, 0, 0),
    CpuidEntry(0xD, 9, True, 0x8, 0x980, 0, 0),
    CpuidEntry(0x14, 0, True, 1, 2, 3, 4),
    CpuidEntry(0x8000_0001, 0, False, 0, 0, ALL, ALL),
    CpuidEntry(0x8000_0008, 0, False, 0x3030, ALL, 0x7007, 0),
    CpuidEntry(0x8000_001D, 3, True, 0x4163, 0, 0, 0),
    CpuidEntry(0x8000_001E, 0, False, 9, 0x0104, 0x0301, 0),
    CpuidEntry(0x4000_0001, 0, False, 0x0100_7EFB, 0, 0, 0),
]


def _build(option: str = "host", vcpu_id: int = 0, count: int = 1) -> dict[Key, CpuidEntry]:
    entries = build(SUPPORTED, parse_cpu_option(option), vcpu_id, vcpu_count=count)
    table = {(entry.function, entry.index): entry for entry in entries}
    assert len(table) == len(entries)
    return table


def test_host_is_everything() -> None:
    assert parse_cpu_option("host") == CpuModel()


def test_features_are_taken_away_and_required() -> None:
    model = parse_cpu_option("host,-avx2,+aes,-pku")
    assert model == CpuModel(removed=frozenset({"avx2", "pku"}), required=frozenset({"aes"}))


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("", "unknown model ''"),
        ("qemu64", "unknown model 'qemu64'"),
        ("host,xsave", "neither '-feature' nor '\\+feature'"),
        ("host,", "neither '-feature' nor '\\+feature'"),
        ("host,-", "unknown feature ''"),
        ("host,-xsafe", "unknown feature 'xsafe'; did you mean xsave\\?"),
        ("host,-aes,+aes", "'aes' is both"),
        ("host,-xsave,+avx2", "'avx2' is both"),
    ],
)
def test_a_bad_option_is_one_line_naming_it(option: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_cpu_option(option)
    assert str(caught.value).startswith("--cpu: ")
    assert "\n" not in str(caught.value)


@given(st.text() | st.lists(st.sampled_from(["host", "-avx", "+avx", "-", "x"])).map(",".join))
def test_any_text_is_parsed_or_refused(option: str) -> None:
    try:
        model = parse_cpu_option(option)
    except ConfigError:
        return
    assert not model.removed & model.required


def test_the_hypervisor_bit_and_kvms_leaves_are_there() -> None:
    table = _build()
    assert table[1, 0].ecx >> 31 == 1
    signature = table[0x4000_0000, 0]
    name = b"".join(r.to_bytes(4, "little") for r in (signature.ebx, signature.ecx, signature.edx))
    assert name == b"KVMKVMKVM\0\0\0"
    assert signature.eax == 0x4000_0001
    assert table[0x4000_0001, 0].eax == 0x0100_7EFB


def test_the_tsc_deadline_timer_is_added_when_kvm_has_it() -> None:
    without = build(SUPPORTED, CpuModel(), 0)
    with_it = build(SUPPORTED, CpuModel(), 0, tsc_deadline=True)
    assert [e.ecx >> 24 & 1 for e in (*without, *with_it) if e.function == 1] == [0, 1]
    off = build(SUPPORTED, parse_cpu_option("host,-tsc_deadline_timer"), 0, tsc_deadline=True)
    assert [e.ecx >> 24 & 1 for e in off if e.function == 1] == [0]


def test_a_removed_feature_is_gone_from_every_leaf_that_repeats_it() -> None:
    table = _build("host,-mmx")
    assert table[1, 0].edx >> 23 & 1 == 0
    assert table[0x8000_0001, 0].edx >> 23 & 1 == 0
    assert table[1, 0].edx >> 24 & 1 == 1  # its neighbour, fxsr


def test_without_xsave_all_that_rests_on_it_goes() -> None:
    table = _build("host,-xsave")
    assert not any(function == 0xD for function, _ in table)
    for bit in (26, 27, 28, 12, 29):  # xsave, osxsave, avx, fma, f16c
        assert table[1, 0].ecx >> bit & 1 == 0
    for bit in (5, 16, 17, 21, 26, 27, 28, 30, 31):  # avx2 and AVX-512
        assert table[7, 0].ebx >> bit & 1 == 0
    assert table[7, 0].ecx >> 3 & 3 == 0  # pku, ospke
    assert table[1, 0].ecx >> 25 & 1 == 1  # aes stays
    assert table[7, 0].ebx >> 9 & 1 == 1  # erms stays


def test_without_avx512_its_state_components_go_and_the_area_shrinks() -> None:
    table = _build("host,-avx512f,-pku")
    head = table[0xD, 0]
    assert head.eax == 0x7
    assert head.ecx == head.ebx == 0x340
    assert {index for function, index in table if function == 0xD} == {0, 1, 2}
    assert table[7, 0].ebx >> 5 & 1 == 1  # avx2 stays


def test_a_feature_takes_its_leaf_with_it() -> None:
    assert (0x14, 0) in _build()
    assert (0x14, 0) not in _build("host,-intel_pt")


def test_a_required_feature_that_kvm_lacks_is_refused() -> None:
    build(SUPPORTED, parse_cpu_option("host,+avx2"), 0)
    poor = [CpuidEntry(1, 0, False, 0, 0, 0, 0)]
    with pytest.raises(ConfigError, match=r"--cpu: \+avx2: this host's KVM does not offer it"):
        build(poor, parse_cpu_option("host,+avx2"), 0)


@pytest.mark.parametrize(("vcpu_id", "count"), [(0, 1), (0, 4), (3, 4), (5, 6)])
def test_the_topology_is_the_guests_not_the_hosts(vcpu_id: int, count: int) -> None:
    table = _build(vcpu_id=vcpu_id, count=count)
    basic = table[1, 0]
    assert (basic.ebx >> 24, basic.ebx >> 16 & 0xFF, basic.ebx & 0xFFFF) == (vcpu_id, count, 0x800)
    assert basic.edx >> 28 & 1 == (count > 1)
    bits = (count - 1).bit_length()
    levels = [table[0xB, index] for index in range(3)]
    assert [(e.eax, e.ebx, e.ecx, e.edx) for e in levels] == [
        (0, 1, 0x100, vcpu_id),
        (bits, count, 0x201, vcpu_id),
        (0, 0, 0x002, vcpu_id),
    ]
    assert table[4, 0].eax == 0x121 | count - 1 << 26
    assert table[4, 3].eax == 0x163 | count - 1 << 14 | count - 1 << 26
    assert table[4, 4].eax == 0
    assert table[0x8000_001D, 3].eax == 0x163 | count - 1 << 14
    assert table[0x8000_0008, 0].ecx == bits << 12 | count - 1
    assert (table[0x8000_001E, 0].eax, table[0x8000_001E, 0].ebx) == (vcpu_id, vcpu_id)


def test_what_is_not_mentioned_is_as_kvm_said() -> None:
    table = _build()
    assert table[7, 0] == SUPPORTED[5]
    assert table[0, 0] == SUPPORTED[0]


@pytest.mark.bare
def test_this_hosts_kvm_takes_what_was_built() -> None:
    with Kvm() as kvm:
        supported = kvm.supported_cpuid()
        for option in ("host", "host,-xsave", "host,-avx512f,-kvmclock"):
            with kvm.create_vm() as vm:
                vm.create_irqchip()
                with vm.create_vcpu(0) as vcpu:
                    vcpu.set_cpuid(build(supported, parse_cpu_option(option), 0))
