"""The base model and models from files, applied to hosts that have more and less."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.kvm.cpuid_entry import CpuidEntry
from pyvmm.kvm.handles import Kvm
from pyvmm.x86.cpu_mask import CpuModel
from pyvmm.x86.cpu_model import parse_cpu_option
from pyvmm.x86.cpuid import build

ALL = 0xFFFF_FFFF
Table = dict[tuple[int, int], CpuidEntry]

# Two hosts that have every bit, of two makes, and with leaves that only they have.
INTEL = [
    CpuidEntry(0, 0, False, 0x20, 0x756E6547, 0x6C65746E, 0x49656E69),
    CpuidEntry(1, 0, False, 0x806F8, 0x01020800, ALL & ~(1 << 31), ALL),
    CpuidEntry(4, 3, True, 0x1C03_C163, 1, 2, 3),
    CpuidEntry(6, 0, False, ALL, ALL, ALL, ALL),
    CpuidEntry(7, 0, True, 2, ALL, ALL, ALL),
    CpuidEntry(7, 2, True, 0, 0, 0, ALL),
    CpuidEntry(0xA, 0, False, ALL, ALL, ALL, ALL),
    CpuidEntry(0xB, 0, True, 1, 2, 0x100, 9),
    CpuidEntry(0xD, 0, True, 0xE7, 0x988, 0x988, 0),
    CpuidEntry(0xD, 1, True, ALL, 0x988, 0, 0),
    CpuidEntry(0xD, 2, True, 0x100, 0x240, 0, 0),
    CpuidEntry(0xD, 5, True, 0x40, 0x340, 0, 0),
    CpuidEntry(0x20, 0, True, 1, 1, 0, 0),
    CpuidEntry(0x8000_0000, 0, False, 0x8000_0008, 0, 0, 0),
    CpuidEntry(0x8000_0001, 0, False, 0, 0, 0x121, 0x2C10_0800),
    CpuidEntry(0x8000_0007, 0, False, 0, 0, 0, ALL),
    CpuidEntry(0x8000_0008, 0, False, 0x3934, ALL, 0, ALL),
    CpuidEntry(0x4000_0001, 0, False, 0x0100_7EFB, 0, 0, 0),
]
AMD = [
    CpuidEntry(0, 0, False, 0x10, 0x68747541, 0x444D4163, 0x69746E65),
    *INTEL[1:2], *INTEL[3:5], *INTEL[7:10],
    CpuidEntry(0x8000_0000, 0, False, 0x8000_0021, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(0x8000_0001, 0, False, 0xA20F10, 0x2000_0000, ALL, ALL),
    CpuidEntry(0x8000_0007, 0, False, ALL, ALL, ALL, ALL),
    CpuidEntry(0x8000_0008, 0, False, 0x3030, ALL, 0x7007, ALL),
    CpuidEntry(0x8000_000A, 0, False, 1, 8, 0, ALL),
    CpuidEntry(0x8000_001D, 3, True, 0x4163, 0, 0, 0),
    CpuidEntry(0x8000_001E, 0, False, 9, 0x0104, 0x0301, 0),
    CpuidEntry(0x8000_0021, 0, False, ALL, 0, 0, 0),
    CpuidEntry(0x4000_0001, 0, False, 0x0100_7EFB, 0, 0, 0),
]  # fmt: skip
FEATURE_REGISTERS = [
    (1, "ecx"), (6, "eax"), (6, "ecx"), (0x8000_0007, "edx"), (0x8000_0008, "ebx"),
]


def table(host: list[CpuidEntry], model: CpuModel) -> Table:
    return {(e.function, e.index): e for e in build(host, model, 0, tsc_deadline=True)}


def without(host: list[CpuidEntry], function: int, register: str, bit: int) -> list[CpuidEntry]:
    """The host, lacking a bit."""
    return [
        e.replace(**{register: getattr(e, register) & ~(1 << bit)})
        if e.function == function else e
        for e in host
    ]


def refusal(host: list[CpuidEntry], model: CpuModel) -> str:
    """What the host is said to lack, "" if nothing."""
    try:
        build(host, model, 0)
    except ConfigError as error:
        return str(error).partition("does not offer ")[2]
    return ""


def template(folder: Path, *leaves: tuple[str, str, dict[str, str]], options: str = "") -> CpuModel:
    """The model of a file of (leaf, subleaf, bitmaps by register)."""
    path = folder / "cpu.json"
    path.write_text(json.dumps({"cpuid_modifiers": [
        {"leaf": leaf, "subleaf": subleaf, "modifiers": [
            {"register": register, "bitmap": bitmap} for register, bitmap in bitmaps.items()
        ]}
        for leaf, subleaf, bitmaps in leaves
    ]}))
    return parse_cpu_option(f"{path}{options}")


@pytest.mark.parametrize("host", [INTEL, AMD])
def test_base_is_x86_64_v2_and_what_a_kernel_needs(host: list[CpuidEntry]) -> None:
    guest = table(host, parse_cpu_option("base"))
    ecx = guest[1, 0].ecx
    # pni ssse3 cx16 sse4_1 sse4_2 popcnt; x2apic tsc_deadline_timer hypervisor
    assert ecx == sum(1 << bit for bit in (0, 9, 13, 19, 20, 23, 21, 24, 31))
    assert guest[1, 0].edx == 0x078B_FBFF, "up to sse2, without pn, dts, acpi"
    assert guest[0x8000_0001, 0].edx >> 11 & 1 == 1  # syscall
    assert guest[0x8000_0001, 0].edx >> 29 & 1 == 1  # lm
    assert guest[0x8000_0001, 0].edx >> 27 & 1 == 0  # rdtscp
    assert guest[0x8000_0001, 0].ecx & 1 == 1  # lahf_lm
    assert guest[6, 0].eax == 1 << 2  # arat
    assert guest[0x8000_0007, 0].edx == 1 << 8  # constant_tsc
    assert (guest[0x8000_0008, 0].ebx, guest[0x8000_0008, 0].edx) == (0, 0)
    assert not {7, 0xA, 0xD, 0x20, 0x8000_000A, 0x8000_0021} & {function for function, _ in guest}
    assert guest[0, 0].eax == 0xB
    assert guest[0, 0].ebx == host[0].ebx, "the make stays the host's"
    assert guest[0x4000_0001, 0].eax == 0x0100_7EFB, "KVM's own features do too"


def test_base_is_the_same_on_different_hosts() -> None:
    intel, amd = (table(host, parse_cpu_option("base")) for host in (INTEL, AMD))
    for function, register in FEATURE_REGISTERS:
        values = [getattr(guest[function, 0], register) for guest in (intel, amd)]
        assert values[0] == values[1], (hex(function), register)


def test_the_last_leaves_are_those_that_are_left() -> None:
    intel, amd = (table(host, parse_cpu_option("base")) for host in (INTEL, AMD))
    assert (intel[0x8000_0000, 0].eax, amd[0x8000_0000, 0].eax) == (0x8000_0008, 0x8000_001E)


@pytest.mark.parametrize(("function", "register", "bit", "name"), [
    (1, "ecx", 20, "sse4_2"), (1, "ecx", 23, "popcnt"), (0x8000_0001, "ecx", 0, "lahf_lm"),
])
def test_base_is_refused_where_the_host_has_less(
    function: int, register: str, bit: int, name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^--cpu base: .* does not offer {name}$"):
        build(without(INTEL, function, register, bit), parse_cpu_option("base"), 0)


def test_all_that_is_missing_is_named() -> None:
    host = [e.replace(ecx=0) if e.function == 1 else e for e in INTEL]
    with pytest.raises(ConfigError, match=r"offer cx16, pni, popcnt, sse4_1, sse4_2, ssse3$"):
        build(host, parse_cpu_option("base"), 0)


def test_base_takes_changes_too() -> None:
    host = without(INTEL, 1, "ecx", 23)
    for some_host in (host, INTEL):
        guest = table(some_host, parse_cpu_option("base,-popcnt,+sse4_1"))
        assert guest[1, 0].ecx >> 23 & 1 == 0
    with pytest.raises(ConfigError, match=r"--cpu: \+avx2: the model base leaves it out"):
        build(INTEL, parse_cpu_option("base,+avx2"), 0)


def test_bits_are_cleared_kept_and_demanded(tmp_path: Path) -> None:
    model = template(tmp_path, ("0x7", "0x0", {"ebx": "0b1xxxx0xxxx", "edx": "0b" + "0" * 32}))
    guest = table(INTEL, model)
    assert guest[7, 0].ebx == ALL & ~(1 << 4)
    assert guest[7, 0].edx == 0
    assert guest[7, 0].ecx & 1 == 1
    assert guest[1, 0].ecx >> 25 & 1 == 1, "what is not mentioned stays"


def test_a_demanded_bit_that_the_host_lacks_is_named(tmp_path: Path) -> None:
    model = template(tmp_path, ("0x7", "0x0", {"ebx": "0b1000000000", "eax": "0b1xxx"}))
    host = without(INTEL, 7, "ebx", 9)
    with pytest.raises(ConfigError, match=r"cpu.json: .* offer erms, leaf 0x7 eax bit 3$"):
        build(host, model, 0)


def test_a_leaf_that_the_host_lacks_can_be_masked_but_not_demanded(tmp_path: Path) -> None:
    assert table(INTEL, template(tmp_path, ("0x7", "0x5", {"eax": "0b0"})))
    with pytest.raises(ConfigError, match=r"offer leaf 0x7 subleaf 0x5 eax bit 0$"):
        build(INTEL, template(tmp_path, ("0x7", "0x5", {"eax": "0b1"})), 0)


def test_what_rests_on_a_masked_feature_goes_too(tmp_path: Path) -> None:
    model = template(tmp_path, ("0x1", "0x0", {"ecx": "0b0" + "x" * 28}))  # avx
    guest = table(INTEL, model)
    assert guest[7, 0].ebx >> 5 & 1 == 0, "avx2"
    assert guest[0xD, 0].eax & 0xE4 == 0, "the state of AVX and AVX-512"
    assert (0xD, 2) not in guest
    assert guest[1, 0].ecx >> 26 & 1 == 1, "xsave stays"


def test_a_feature_masked_in_one_leaf_is_gone_from_every_other(tmp_path: Path) -> None:
    guest = table(AMD, template(tmp_path, ("0x1", "0x0", {"edx": "0b0" + "x" * 23})))  # mmx
    assert guest[0x8000_0001, 0].edx >> 23 & 1 == 0


def test_wanting_what_is_taken_away_is_refused(tmp_path: Path) -> None:
    model = template(tmp_path, ("0x1", "0x0", {"ecx": "0b0" + "x" * 28}),
                     ("0x7", "0x0", {"ebx": "0b1xxxxx"}))
    with pytest.raises(ConfigError, match=r"cpu.json: wants avx2, and takes that away too"):
        build(INTEL, model, 0)


def test_what_the_user_removes_by_name_is_not_wanted_any_more(tmp_path: Path) -> None:
    model = template(tmp_path, ("0x7", "0x0", {"ebx": "0b1xxxxx"}), options=",-avx")
    assert table(INTEL, model)[7, 0].ebx >> 5 & 1 == 0


def test_a_template_can_hide_the_hypervisor(tmp_path: Path) -> None:
    guest = table(INTEL, template(tmp_path, ("0x1", "0x0", {"ecx": "0b0" + "x" * 31})))
    assert guest[1, 0].ecx >> 31 == 0


NEEDED = ["fpu", "msr", "pae", "cx8", "apic", "cmov", "fxsr", "sse", "sse2", "syscall", "lm"]
BITS = {
    **{name: ("0x1", bit) for name, bit in {
        "fpu": 0, "msr": 5, "pae": 6, "cx8": 8, "apic": 9, "cmov": 15, "fxsr": 24, "sse": 25,
        "sse2": 26,
    }.items()},
    "syscall": ("0x80000001", 11), "lm": ("0x80000001", 29),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("host", [INTEL, AMD], ids=["intel", "amd"])
def test_what_every_64_bit_linux_runs_on_cannot_be_taken_away(
    tmp_path: Path, host: list[CpuidEntry], name: str
) -> None:
    leaf, bit = BITS[name]
    masked = template(tmp_path, (leaf, "0x0", {"edx": "0b0" + "x" * bit}))
    for model in (masked, parse_cpu_option(f"host,-{name}"), parse_cpu_option(f"base,-{name}")):
        with pytest.raises(ConfigError) as caught:
            build(host, model, 0)
        message = str(caught.value)
        assert message.startswith(f"--cpu {model.name}: takes away ")
        assert re.search(rf"\b{name}\b.*, without which no 64-bit Linux runs$", message)


def test_what_the_host_does_not_have_is_not_missed() -> None:
    """A KVM that is not complete may say nothing of it, and boot all the same."""
    host = without(INTEL, 1, "edx", 5)
    assert build(host, parse_cpu_option("host,-avx"), 0)


@pytest.mark.parametrize(("leaf", "bitmap", "what"), [
    ("0x0", "0b" + "0" * 32, "leaf 0x0 eax, the number of the last leaf"),
    ("0x80000000", "0b0" + "x" * 31, "leaf 0x80000000 eax, the number of the last leaf"),
    ("0x80000008", "0b" + "x" * 7 + "0" + "x" * 8,
     "leaf 0x80000008 eax, the size of a linear address"),
    ("0x80000008", "0b" + "0" * 16, "leaf 0x80000008 eax, the size of a linear address"),
])
def test_nor_can_what_a_kernel_believes_of_its_addresses_and_leaves(
    tmp_path: Path, leaf: str, bitmap: str, what: str
) -> None:
    model = template(tmp_path, (leaf, "0x0", {"eax": bitmap}))
    with pytest.raises(ConfigError) as caught:
        build(INTEL, model, 0)
    assert str(caught.value) == (
        f"--cpu {model.name}: takes away {what}, without which no 64-bit Linux runs"
    )


def test_a_fleet_may_have_fewer_bits_of_physical_address(tmp_path: Path) -> None:
    fewer = "0b" + "x" * 8 + f"{0x27:08b}".replace("1", "x")  # 0x34 & 0x27: 36 bits
    model = template(tmp_path, ("0x80000008", "0x0", {"eax": fewer}))
    assert table(INTEL, model)[0x8000_0008, 0].eax == 0x3924
    assert build(INTEL, model, 0, memory_end=1 << 36)
    with pytest.raises(ConfigError, match="leaves 36 bits of physical address, this machine needs "
                                          "37"):
        build(INTEL, model, 0, memory_end=(1 << 36) + 1)


@pytest.mark.parametrize("kept", ["0bx0xxxxx", "0b00000000"])
def test_but_not_fewer_than_any_64_bit_processor_has(tmp_path: Path, kept: str) -> None:
    model = template(tmp_path, ("0x80000008", "0x0", {"eax": kept}))
    with pytest.raises(ConfigError, match=r"eax leaves \d+ bits of physical address, this machine "
                                          "needs 36$"):
        build(INTEL, model, 0)


def test_address_sizes_that_are_left_alone_may_be_mentioned(tmp_path: Path) -> None:
    model = template(tmp_path, ("0x80000008", "0x0", {"eax": "0b0000000000000000" + "x" * 16}))
    assert table(INTEL, model)[0x8000_0008, 0].eax == 0x3934


@pytest.mark.bare
def test_this_hosts_kvm_takes_base_less_what_it_lacks() -> None:
    with Kvm() as kvm:
        supported = kvm.supported_cpuid()
        lacks = re.findall(r"\w+", refusal(supported, parse_cpu_option("base")))
        model = parse_cpu_option(",".join(["base", *(f"-{name}" for name in lacks)]))
        with kvm.create_vm() as vm:
            vm.create_irqchip()
            with vm.create_vcpu(0) as vcpu:
                vcpu.set_cpuid(build(supported, model, 0))
