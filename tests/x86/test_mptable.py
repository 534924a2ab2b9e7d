"""The MP table, read as Linux does: by scanning for it, and entry by entry."""

from __future__ import annotations

import struct

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.mptable import write_mp_table

LENGTHS = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def found_table(memory: GuestMemory) -> list[bytes]:
    """The entries of the table found in the last KiB of base memory; checks both checksums."""
    area = memory.read(0x9FC00, 0x400)
    at = next(i for i in range(0, 0x400, 16) if area[i : i + 4] == b"_MP_")
    pointer = area[at : at + 16]
    assert sum(pointer) % 256 == 0
    assert pointer[8] == 1
    (gpa,) = struct.unpack_from("<I", pointer, 4)
    length, count = *struct.unpack("<H", memory.read(gpa + 4, 2)), *struct.unpack(
        "<H", memory.read(gpa + 34, 2)
    )
    table = memory.read(gpa, length)
    assert table[:4] == b"PCMP"
    assert sum(table) % 256 == 0
    assert gpa + length <= 0xA0000
    entries, at = [], 44
    while at < length:
        size = LENGTHS[table[at]]
        entries.append(table[at : at + size])
        at += size
    assert (at, len(entries)) == (length, count)
    return entries


@pytest.mark.parametrize("cpus", [1, 4, 8])
def test_linux_finds_cpus_ioapic_and_lines(cpus: int) -> None:
    memory = GuestMemory.over(bytearray(layout.HIGH_RAM_START))
    write_mp_table(memory, cpus)
    entries = found_table(memory)
    processors = [entry for entry in entries if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(cpus))
    assert [entry[3] for entry in processors] == [3] + [1] * (cpus - 1)
    (ioapic,) = (entry for entry in entries if entry[0] == 2)
    assert ioapic[1] not in range(cpus)
    assert struct.unpack_from("<I", ioapic, 4) == (0xFEC00000,)
    lines = {entry[5]: (entry[6], entry[7]) for entry in entries if entry[0] == 3}
    assert lines == {line: (ioapic[1], line) for line in range(24) if line != 2}
    assert {layout.SERIAL_IRQ, layout.GED_GSI, *layout.VIRTIO_IRQS} <= lines.keys()
