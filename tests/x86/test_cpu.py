"""The boot processor's state; tests/vm/test_bare.py runs guests in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.abi import kvm_segment
from pyvmm.memory import GuestMemory
from pyvmm.x86 import cpu, layout


def _translate(memory: GuestMemory, linear: int) -> int:
    """A 4-level walk with 2 MiB pages (APM 2, 5.3.4), every entry present and writable."""
    table = layout.PAGE_TABLES
    for shift in (39, 30):
        entry = memory.read_int(table + 8 * (linear >> shift & 0x1FF), 8)
        assert entry & 0x83 == 0x03
        table = entry & ~0xFFF
    entry = memory.read_int(table + 8 * (linear >> 21 & 0x1FF), 8)
    assert entry & 0x83 == 0x83
    return entry & ~0x1FFFFF | linear & 0x1FFFFF


def test_the_first_four_gigabytes_map_to_themselves() -> None:
    memory = GuestMemory.over(bytearray(layout.PAGE_TABLES_END + 8))
    cpu.write_page_tables(memory)
    for linear in [*range(0, 4 << 30, 2 << 20), 0x12345, 0xFEE0_0000, 0xFFFF_FFFF]:
        assert _translate(memory, linear) == linear
    assert memory.read_int(layout.PAGE_TABLES_END, 8) == 0
    assert memory.read_int(layout.PAGE_TABLES - 8, 8) == 0


def test_page_tables_outside_ram_are_refused() -> None:
    with pytest.raises(GuestMemoryError):
        cpu.write_page_tables(GuestMemory.over(bytearray(layout.PAGE_TABLES_END - 1)))


@pytest.mark.parametrize(
    ("mode", "code"), [({"l": 1}, 0x00AF_9B00_0000_FFFF), ({"db": 1}, 0x00CF_9B00_0000_FFFF)],
    ids=["64-bit", "32-bit"],
)
def test_the_gdt_holds_the_boot_protocols_segments(mode: dict[str, int], code: int) -> None:
    memory = GuestMemory.over(bytearray(0x1000))
    cpu.write_gdt(memory, kvm_segment(
        limit=0xFFFF_FFFF, selector=0x10, type=0xB, present=1, s=1, g=1, **mode
    ))
    table = [memory.read_int(layout.GDT + selector, 8) for selector in range(0, 0x28, 8)]
    assert table == [0, 0, code, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067]


@given(
    base=st.integers(0, (1 << 32) - 1),
    limit=st.integers(0, (1 << 20) - 1),
    granular=st.booleans(),
    kind=st.integers(0, 15),
    dpl=st.integers(0, 3),
)
def test_a_descriptor_holds_every_field(
    base: int, limit: int, granular: bool, kind: int, dpl: int
) -> None:
    bytes_limit = limit << 12 | 0xFFF if granular else limit
    value = cpu.descriptor(
        kvm_segment(base=base, limit=bytes_limit, type=kind, dpl=dpl, s=1, g=granular, present=1)
    )
    raw = value.to_bytes(8, "little")
    assert int.from_bytes(raw[2:5] + raw[7:8], "little") == base
    assert int.from_bytes(raw[0:2] + bytes([raw[6] & 0xF]), "little") == limit
    assert raw[5] == 0x90 | dpl << 5 | kind
    assert raw[6] >> 4 == (8 if granular else 0)
