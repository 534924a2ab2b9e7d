"""The ACPI tables: written once, below 1 MiB, where an operating system looks for them.

The platform is *hardware-reduced* (ACPI 6.5, section 4.1).  It has no SCI, no fixed power
management registers, no PM timer and no FACS, but a sleep control register for power-off and a
reset register.

An operating system may then leave the 8259 pair as it finds it.  Whoever builds the machine should
mask it, as firmware does.  Unmasked and never initialised, it sends the ISA lines as vectors 0 to
15, which are exceptions, to a first vCPU whose LINT0 is open.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import c_char
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvmm.memory import GuestMemory
from pyvmm.startup.types import IntFlag
from pyvmm.x86 import layout
from pyvmm.x86.acpi.dsdt import VirtioMmioDevice, definition_block
from pyvmm.x86.image import align_up

_OEM_ID, _OEM_TABLE_ID, _CREATOR_ID = b"PYVMM ", b"PYVMM   ", b"PYVM"
_OEM_REVISION = _CREATOR_REVISION = 1
_ALIGNMENT = 16
_DSDT_REVISION = 2  # integers of 64 bits
_FADT_REVISION, _FADT_MINOR_REVISION = 6, 5
_MADT_REVISION = 6
_XSDT_REVISION = 1
_RSDP_REVISION = 2
_RSDP_V1_BYTES = 20  # the part that the first checksum covers

# 5.2.5.3 RSDP Structure, 5.2.6 System Description Table Header.
_RSDP = struct.Struct("<8sB6sBIIQB3x")
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_RSDP_CHECKSUM_AT, _RSDP_EXTENDED_CHECKSUM_AT, _HEADER_CHECKSUM_AT = 8, 32, 9

# 5.2.12 Multiple APIC Description Table: the two fields, then the entries of types 0, 1 and 4.
_MADT_FIELDS = struct.Struct("<II")
_LOCAL_APIC = struct.Struct("<BBBBI")
_IO_APIC = struct.Struct("<BBBBII")
_LOCAL_APIC_NMI = struct.Struct("<BBBHB")
_PCAT_COMPAT = 1 << 0
_ENABLED = 1 << 0
_ALL_PROCESSORS = 0xFF
_NMI_LINT = 1

_RTC_CENTURY = 0x32  # the CMOS register where PCs keep it

_SYSTEM_IO = 1
_BYTE_ACCESS = 1


class BootArchitecture(IntFlag):
    """5.2.9.3 IA-PC Boot Architecture Flags, those that pyvmm sets.

    8042 is not among them.  The controller is there for its reset, but nothing is behind it, and
    the interrupts 1 and 12, which Linux would request to probe it, are not legacy lines here.
    """

    VGA_NOT_PRESENT = 1 << 2
    CMOS_RTC_NOT_PRESENT = 1 << 5


class FixedFeature(IntFlag):
    """5.2.9.2 Fixed ACPI Description Table: Fixed Feature Flags, those that pyvmm sets.

    For buttons and RTC, a set flag means that the fixed registers have none.
    """

    WBINVD = 1 << 0
    PWR_BUTTON = 1 << 4
    SLP_BUTTON = 1 << 5
    FIX_RTC = 1 << 6
    RESET_REG_SUP = 1 << 10
    HW_REDUCED_ACPI = 1 << 20


class GenericAddress(ctypes.LittleEndianStructure):
    """5.2.3.2 Generic Address Structure."""

    __slots__ = ()
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("space_id", u8),
        ("bit_width", u8),
        ("bit_offset", u8),
        ("access_width", u8),
        ("address", u64),
    ]


class Fadt(ctypes.LittleEndianStructure):
    """5.2.9 Fixed ACPI Description Table behind its header, with ACPICA's names.

    Parts that a hardware-reduced platform does not have are arrays of bytes.
    """

    __slots__ = ()
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("facs", u32),
        ("dsdt", u32),
        ("model", u8),
        ("preferred_profile", u8),
        ("_fixed_hardware", u8 * 62),
        ("century", u8),
        ("boot_flags", u16),
        ("reserved", u8),
        ("flags", u32),
        ("reset_register", GenericAddress),
        ("reset_value", u8),
        ("arm_boot_flags", u16),
        ("minor_revision", u8),
        ("x_facs", u64),
        ("x_dsdt", u64),
        ("_x_fixed_hardware", GenericAddress * 8),
        ("sleep_control", GenericAddress),
        ("sleep_status", GenericAddress),
        ("hypervisor_id", c_char * 8),
    ]


def write_acpi_tables(
    memory: GuestMemory,
    *,
    vcpu_count: int,
    devices: Sequence[VirtioMmioDevice],
    rtc: bool = False,
) -> int:
    """Write all tables from ``layout.ACPI_TABLES`` on; return the GPA of the RSDP.

    That address goes into ``boot_params.acpi_rsdp_addr`` or PVH's start info.  A guest that is not
    told it finds it by scanning.  ``vcpu_count`` is 1 to 254, with APIC IDs from 0.  The guest
    finds ``devices`` in this order.  ``rtc`` is True if there is a CMOS clock.

    ValueError if the tables are longer than their place.
    """
    gpa = layout.ACPI_TABLES + align_up(_RSDP.size, _ALIGNMENT)
    tables = bytearray()

    def place(table: bytes) -> int:
        address = gpa + len(tables)
        tables.extend(table.ljust(align_up(len(table), _ALIGNMENT), b"\0"))
        return address

    block = definition_block(vcpu_count, devices, rtc=rtc)
    dsdt_gpa = place(_table(b"DSDT", _DSDT_REVISION, block))
    fadt_gpa = place(_table(b"FACP", _FADT_REVISION, _fadt(dsdt_gpa, rtc=rtc)))
    madt_gpa = place(_table(b"APIC", _MADT_REVISION, _madt(vcpu_count)))
    xsdt_gpa = place(_table(b"XSDT", _XSDT_REVISION, struct.pack("<2Q", fadt_gpa, madt_gpa)))
    if gpa + len(tables) > layout.ACPI_TABLES_END:
        raise ValueError(f"{len(tables)} bytes of ACPI tables do not fit at {gpa:#x}")
    memory.write(gpa, tables)
    memory.write(layout.ACPI_TABLES, _rsdp(xsdt_gpa))
    return layout.ACPI_TABLES


def _rsdp(xsdt_gpa: int) -> bytes:
    """Return 5.2.5 Root System Description Pointer; it has no RSDT."""
    rsdp = _RSDP.pack(b"RSD PTR ", 0, _OEM_ID, _RSDP_REVISION, 0, _RSDP.size, xsdt_gpa, 0)
    first = _with_checksum(rsdp[:_RSDP_V1_BYTES], _RSDP_CHECKSUM_AT)
    return _with_checksum(first + rsdp[_RSDP_V1_BYTES:], _RSDP_EXTENDED_CHECKSUM_AT)


def _fadt(dsdt_gpa: int, *, rtc: bool) -> bytes:
    """Return the FADT behind its header."""
    boot = BootArchitecture.VGA_NOT_PRESENT
    features = FixedFeature.WBINVD | FixedFeature.PWR_BUTTON | FixedFeature.SLP_BUTTON
    features |= FixedFeature.FIX_RTC | FixedFeature.RESET_REG_SUP | FixedFeature.HW_REDUCED_ACPI
    fadt = Fadt(
        dsdt=dsdt_gpa,
        x_dsdt=dsdt_gpa,
        flags=features,
        reset_register=_byte_port(layout.RESET_PORT),
        reset_value=layout.RESET_VALUE,
        sleep_control=_byte_port(layout.SLEEP_CONTROL_PORT),
        sleep_status=_byte_port(layout.SLEEP_STATUS_PORT),
        minor_revision=_FADT_MINOR_REVISION,
        hypervisor_id=b"PYVMM",
    )
    if rtc:
        fadt.century = _RTC_CENTURY
    else:
        boot |= BootArchitecture.CMOS_RTC_NOT_PRESENT
    fadt.boot_flags = boot
    return bytes(fadt)


def _byte_port(port: int) -> GenericAddress:
    return GenericAddress(
        space_id=_SYSTEM_IO, bit_width=8, access_width=_BYTE_ACCESS, address=port
    )


def _madt(vcpu_count: int) -> bytes:
    """Return the MADT behind its header: the same CPUs, IOAPIC and NMI line as in the MP table.

    It has no interrupt source overrides.  Then every ISA line has the IOAPIC's pin of its number,
    edge-triggered and active high (5.2.12.5).
    """
    entries = [_MADT_FIELDS.pack(layout.LAPIC, _PCAT_COMPAT)]
    entries += [
        _LOCAL_APIC.pack(0, _LOCAL_APIC.size, uid, uid, _ENABLED) for uid in range(vcpu_count)
    ]
    ioapic_id = vcpu_count
    entries.append(_IO_APIC.pack(1, _IO_APIC.size, ioapic_id, 0, layout.IOAPIC, 0))
    entries.append(_LOCAL_APIC_NMI.pack(4, _LOCAL_APIC_NMI.size, _ALL_PROCESSORS, 0, _NMI_LINT))
    return b"".join(entries)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Return ``body`` behind the header that all tables but the RSDP have."""
    header = _HEADER.pack(
        signature, _HEADER.size + len(body), revision, 0, _OEM_ID, _OEM_TABLE_ID, _OEM_REVISION,
        _CREATOR_ID, _CREATOR_REVISION,
    )
    return _with_checksum(header + body, _HEADER_CHECKSUM_AT)


def _with_checksum(data: bytes, at: int) -> bytes:
    """Return ``data`` with the byte ``at`` chosen so that all bytes add up to 0 modulo 256."""
    summed = bytearray(data)
    summed[at] = -sum(data) & 0xFF
    return bytes(summed)
