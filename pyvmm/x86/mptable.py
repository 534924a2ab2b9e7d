"""The MP table, which lists CPUs, IOAPIC and interrupt lines for kernels without ACPI.

Intel MultiProcessor Specification 1.4, chapter 4.  Without it Linux falls back to one possible CPU
and to the 8259 pair, whose every interrupt costs it several accesses to the chip.
"""

from __future__ import annotations

import struct

from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout

_SPEC_REVISION = 4  # 1.4
_LAPIC, _IOAPIC = 0xFEE0_0000, 0xFEC0_0000
_LAPIC_VERSION, _IOAPIC_VERSION = 0x14, 0x11
_ISA_BUS = 0
_ALL_APICS = 0xFF
IOAPIC_LINES = 24

# 4.1 MP Floating Pointer Structure, 4.2 MP Configuration Table Header, 4.3 the entries.
_FLOATING_POINTER = struct.Struct("<4sIBBB5B")
_HEADER = struct.Struct("<4sHBB8s12sIHHIHBB")
_PROCESSOR = struct.Struct("<BBBBIIQ")
_BUS = struct.Struct("<BB6s")
_IOAPIC_ENTRY = struct.Struct("<BBBBI")
_INTERRUPT = struct.Struct("<BBHBBBB")

_CPU_ENABLED, _CPU_BOOT = 1, 2
_FEATURES_FPU_APIC = 1 << 0 | 1 << 9
_INT, _NMI, _EXTINT = 0, 1, 3
_IO_INTERRUPT, _LOCAL_INTERRUPT = 3, 4


def write_mp_table(memory: GuestMemory, cpus: int) -> None:
    """Describe ``cpus`` CPUs with APIC IDs from 0, at ``layout.MP_TABLE``.

    Every line goes to the IOAPIC pin of its number, as KVM routes GSIs; line 2 is the cascade.
    Lines from 16 on belong to no ISA bus, but the only other bus that kernels know here is PCI.
    """
    entries = [
        _PROCESSOR.pack(
            0, cpu, _LAPIC_VERSION, _CPU_ENABLED | (_CPU_BOOT if cpu == 0 else 0), 0,
            _FEATURES_FPU_APIC, 0,
        )
        for cpu in range(cpus)
    ]
    ioapic_id = cpus
    entries.append(_BUS.pack(1, _ISA_BUS, b"ISA   "))
    entries.append(_IOAPIC_ENTRY.pack(2, ioapic_id, _IOAPIC_VERSION, 1, _IOAPIC))
    entries += [
        # Flags 0: polarity and trigger mode are the bus's, for ISA active high and edge.
        _INTERRUPT.pack(_IO_INTERRUPT, _INT, 0, _ISA_BUS, line, ioapic_id, line)
        for line in range(IOAPIC_LINES)
        if line != 2
    ]
    entries.append(_INTERRUPT.pack(_LOCAL_INTERRUPT, _EXTINT, 0, _ISA_BUS, 0, _ALL_APICS, 0))
    entries.append(_INTERRUPT.pack(_LOCAL_INTERRUPT, _NMI, 0, _ISA_BUS, 0, _ALL_APICS, 1))
    body = b"".join(entries)
    header = _HEADER.pack(
        b"PCMP", _HEADER.size + len(body), _SPEC_REVISION, 0, b"PYVMM   ", b"PYVMM       ",
        0, 0, len(entries), _LAPIC, 0, 0, 0,
    )
    table_gpa = layout.MP_TABLE + _FLOATING_POINTER.size
    pointer = _FLOATING_POINTER.pack(b"_MP_", table_gpa, 1, _SPEC_REVISION, 0, 0, 0, 0, 0, 0)
    memory.write(layout.MP_TABLE, _with_checksum(pointer, 10) + _with_checksum(header + body, 7))


def _with_checksum(data: bytes, at: int) -> bytes:
    """Return ``data`` with the byte ``at`` chosen so that all bytes add up to 0 modulo 256."""
    summed = bytearray(data)
    summed[at] = -sum(data) & 0xFF
    return bytes(summed)
