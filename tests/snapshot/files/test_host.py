"""A snapshot of another host: one line that names what this host lacks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pyvmm.errors import SnapshotError
from pyvmm.kvm.cpuid_entry import CpuidEntry, pack
from pyvmm.snapshot.files.host import SavedHost, check_host, host_record, read_host
from pyvmm.snapshot.files.records import decode, encode

SSE3, HYPERVISOR, AVX, X2APIC = 1 << 0, 1 << 31, 1 << 28, 1 << 21


def cpu(
    *, vendor: bytes = b"GenuineIntel", ecx: int = SSE3 | AVX, xcr0: int = 7, bits: int = 46,
    apic_id: int = 0,
) -> list[CpuidEntry]:
    """A few leaves of a processor."""
    b, d, c = (int.from_bytes(vendor[at : at + 4], "little") for at in (0, 4, 8))
    return [
        CpuidEntry(0, 0, False, 0xD, b, c, d),
        CpuidEntry(1, 0, False, 0x806C1, apic_id << 24 | 0x800, ecx, 1),
        CpuidEntry(0xB, 0, True, 0, 0, 0, apic_id),
        CpuidEntry(0xD, 0, True, xcr0, 576, 576, 0),
        CpuidEntry(0x8000_0008, 0, False, 48 << 8 | bits, 0, 0, 0),
    ]


def saved(
    given: Sequence[CpuidEntry], supported: Sequence[CpuidEntry] | None = None,
    tsc_khz: int | None = 2_000_000,
) -> SavedHost:
    """The record of a machine with one vCPU, after a way through a file."""
    record = host_record(supported=supported or given, given=[pack(given)], tsc_khz=tsc_khz)
    state = decode(encode({"host": record}, name="f"), name="f")
    return read_host(state["host"], name="f")


def check(
    host: SavedHost, here: Sequence[CpuidEntry], tsc_khz: int = 2_000_000, *, scales: bool = False
) -> None:
    check_host(host, name="DIR", supported=pack(here), tsc_khz=tsc_khz, scales_tsc=scales)


def test_the_same_host_goes_on() -> None:
    host = saved(cpu(ecx=SSE3 | HYPERVISOR | X2APIC), cpu())
    assert host.given == (bytes(pack(cpu(ecx=SSE3 | HYPERVISOR | X2APIC))),)
    check(host, cpu())
    check(host, cpu(apic_id=5))


def test_a_better_host_goes_on() -> None:
    check(saved(cpu(ecx=SSE3 | HYPERVISOR | X2APIC)), cpu(xcr0=0xE7, bits=52))


def test_what_the_guest_was_not_given_may_be_missing() -> None:
    check(saved(cpu(ecx=SSE3, xcr0=3), cpu()), cpu(ecx=SSE3, xcr0=3))


@pytest.mark.parametrize(("here", "problem"), [
    (cpu(vendor=b"AuthenticAMD"), r"of 'GenuineIntel', and this host's is of 'AuthenticAMD'"),
    (cpu(ecx=SSE3), r"not offer: avx$"),
    (cpu(ecx=0), r"not offer: pni, avx$"),
    (cpu(xcr0=3), r"not offer: the state of avx$"),
    (cpu(bits=39), r"knows 46 bits of physical address, and this host has 39$"),
    ([], r"this host's is of ''"),
])
def test_a_host_that_lacks_something_is_told_in_one_line(
    here: list[CpuidEntry], problem: str
) -> None:
    with pytest.raises(SnapshotError, match=rf"^DIR: .*{problem}"):
        check(saved(cpu()), here)


def test_many_missing_features_are_counted() -> None:
    with pytest.raises(SnapshotError, match=r": pni, pclmulqdq, .* and \d+ more$"):
        check(saved(cpu(ecx=0x7FFF_FFFF)), cpu(ecx=0))


def test_a_tsc_that_cannot_be_scaled() -> None:
    host = saved(cpu())
    check(host, cpu(), 2_000_400)
    check(host, cpu(), 3_000_000, scales=True)
    check(saved(cpu(), tsc_khz=None), cpu(), 3_000_000)
    with pytest.raises(SnapshotError, match=r"TSC runs at 2000000 kHz, this host's at 3000000"):
        check(host, cpu(), 3_000_000)


@pytest.mark.parametrize("change", [
    {"vendor": 5}, {"vendor": "x" * 13}, {"supported": b"x" * 50_000}, {"cpuid": []},
    {"cpuid": [b""]}, {"cpuid": [b"\1" + bytes(7)]}, {"cpuid": [b"\xff" * 48]},
    {"cpuid": [bytes(8)] * 9}, {"cpuid": "x"}, {"tsc_khz": 0}, {"tsc_khz": True}, {"more": 1},
])
def test_a_record_with_anything_in_it_is_refused(change: dict[str, object]) -> None:
    record = host_record(supported=cpu(), given=[pack(cpu())], tsc_khz=1) | change
    with pytest.raises(SnapshotError, match=r"^f: record host: "):
        read_host(record, name="f")


def test_no_dict_is_refused() -> None:
    with pytest.raises(SnapshotError, match=r"^f: record host: "):
        read_host(None, name="f")
