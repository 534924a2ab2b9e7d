"""The ACPI tables, found and followed as Linux does, and judged by iasl."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.acpi import VirtioMmioDevice, write_acpi_tables
from pyvmm.x86.boot_params import E820_TYPE_RESERVED, e820_map
from pyvmm.x86.mptable import write_mp_table
from tests.support.iasl import compile_source, disassemble, without_writer

RAM_BYTES = 2 << 20
RSDP_SOURCE = """
[0008]  Signature : "RSD PTR "
[0001]  Checksum : 00
[0006]  Oem ID : "PYVMM "
[0001]  Revision : 02
[0004]  RSDT Address : 00000000
[0004]  Length : 00000024
[0008]  XSDT Address : {xsdt:016X}
[0001]  Extended Checksum : 00
[0003]  Reserved : 000000
"""


def virtio_devices(count: int) -> list[VirtioMmioDevice]:
    """The first ``count`` devices where the layout has them."""
    slots = map(layout.virtio_slot, range(count))
    return [VirtioMmioDevice(base=base, length=0x1000, gsi=gsi) for base, gsi in slots]


def written(vcpus: int = 1, devices: int = 0, *, rtc: bool = False) -> GuestMemory:
    """Memory with the tables in it."""
    memory = GuestMemory.over(bytearray(RAM_BYTES))
    write_acpi_tables(memory, vcpu_count=vcpus, devices=virtio_devices(devices), rtc=rtc)
    return memory


def scan(memory: GuestMemory) -> int:
    """5.2.5.1: the RSDP is on a 16-byte boundary between 0xe0000 and 0xfffff."""
    (found,) = (
        gpa for gpa in range(0xE0000, 0x100000, 16) if memory.read(gpa, 8) == b"RSD PTR "
    )
    return found


def found_tables(memory: GuestMemory) -> dict[bytes, tuple[int, bytes]]:
    """``(gpa, table)`` by signature; checks every length, checksum and pointer on the way."""
    rsdp_gpa = scan(memory)
    rsdp = memory.read(rsdp_gpa, 36)
    revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", rsdp, 15)
    assert (revision, rsdt, length) == (2, 0, 36)
    assert sum(rsdp[:20]) % 256 == 0
    assert sum(rsdp) % 256 == 0
    tables: dict[bytes, tuple[int, bytes]] = {b"RSD PTR ": (rsdp_gpa, rsdp)}

    def add(gpa: int) -> bytes:
        table = memory.read(gpa, memory.read_int(gpa + 4, 4))
        assert sum(table) % 256 == 0
        assert tables.setdefault(table[:4], (gpa, table)) == (gpa, table)
        return table

    entries = add(xsdt)[36:]
    for (entry,) in struct.iter_unpack("<Q", entries):
        add(entry)
    fadt = tables[b"FACP"][1]
    (dsdt,) = struct.unpack_from("<I", fadt, 40)
    assert struct.unpack_from("<Q", fadt, 140) == (dsdt,)
    add(dsdt)
    assert tables.keys() == {b"RSD PTR ", b"XSDT", b"FACP", b"APIC", b"DSDT"}
    return tables


def fields(source: str) -> dict[str, str]:
    """A disassembled data table's fields; of those with the same name, the last."""
    return dict(re.findall(r"^[^\n]*?\b([A-Z][^:\n]*?)(?: \(V\d\))? : (.*)$", source, re.MULTILINE))


@pytest.mark.parametrize(("vcpus", "devices", "rtc"), [(1, 0, False), (2, 1, True), (8, 8, True)])
def test_iasl_reads_every_table_and_writes_it_back(
    vcpus: int, devices: int, rtc: bool, tmp_path: Path
) -> None:
    tables = found_tables(written(vcpus, devices, rtc=rtc))
    for signature in (b"XSDT", b"FACP", b"APIC", b"DSDT"):
        table = tables[signature][1]
        again = compile_source(disassemble(table, tmp_path), tmp_path)
        assert without_writer(again) == without_writer(table)


def test_rsdp_is_what_iasl_makes_of_its_fields(tmp_path: Path) -> None:
    tables = found_tables(written())
    source = RSDP_SOURCE.format(xsdt=tables[b"XSDT"][0])
    assert compile_source(source, tmp_path) == tables[b"RSD PTR "][1]


def test_tables_are_apart_aligned_and_in_reserved_memory() -> None:
    memory = written(8, 8, rtc=True)
    places = sorted((gpa, gpa + len(table)) for gpa, table in found_tables(memory).values())
    for (_, end), (start, _) in itertools.pairwise(places):
        assert end <= start
    assert all(start % 16 == 0 for start, _ in places)
    (reserved,) = (
        (gpa, gpa + length)
        for gpa, length, kind in e820_map([(0, RAM_BYTES)])
        if kind == E820_TYPE_RESERVED and gpa < RAM_BYTES
    )
    assert reserved[0] <= places[0][0]
    assert places[-1][1] <= reserved[1]
    assert not any(memory.read(0, places[0][0]))
    assert not any(memory.read(places[-1][1], RAM_BYTES - places[-1][1]))


def test_rsdp_is_where_the_caller_is_told() -> None:
    memory = GuestMemory.over(bytearray(RAM_BYTES))
    assert write_acpi_tables(memory, vcpu_count=1, devices=()) == scan(memory)


@pytest.mark.parametrize("rtc", [False, True])
def test_fadt_is_hardware_reduced_and_names_the_power_registers(rtc: bool, tmp_path: Path) -> None:
    source = disassemble(found_tables(written(rtc=rtc))[b"FACP"][1], tmp_path)
    found = fields(source)
    expected = {
        "Hardware Reduced": "1",
        "Reset Register Supported": "1",
        "Value to cause reset": f"{layout.RESET_VALUE:02X}",
        "8042 Present on ports 60/64": "0",
        "VGA Not Present": "1",
        "CMOS RTC Not Present": "0" if rtc else "1",
        "RTC Century Index": "32" if rtc else "00",
        "Control Method Power Button": "1",
        "Control Method Sleep Button": "1",
        "PM Timer Block Address": "00000000",
    }
    assert {name: found[name] for name in expected if name in found} | {
        "8042 Present on ports 60/64": found["Present on ports 60/64"]
    } == expected
    registers = re.findall(
        r"(Reset Register|Sleep \w+ Register) : \[Generic Address Structure\]\n"
        r".*Space ID : 01 \[SystemIO\]\n.*Bit Width : 08\n.*Bit Offset : 00\n"
        r".*Access Width : 01 \[Byte Access:8\]\n.*Address : (\w+)\n",
        source,
    )
    assert {name: int(address, 16) for name, address in registers} == {
        "Reset Register": layout.RESET_PORT,
        "Sleep Control Register": layout.SLEEP_CONTROL_PORT,
        "Sleep Status Register": layout.SLEEP_STATUS_PORT,
    }


@pytest.mark.parametrize("vcpus", [1, 4, 8])
def test_madt_says_what_the_mp_table_says(vcpus: int) -> None:
    madt = found_tables(written(vcpus))[b"APIC"][1]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    processors = [struct.unpack("<BBI", entry[2:]) for entry in entries if entry[0] == 0]
    assert processors == [(cpu, cpu, 1) for cpu in range(vcpus)]
    memory = GuestMemory.over(bytearray(RAM_BYTES))
    write_mp_table(memory, vcpus)
    mp_table = memory.read(layout.MP_TABLE, 0x400)
    # The MP table's IOAPIC entry: type 2, the ID, version 0x11, enabled, the address.
    (mp_ioapic,) = re.findall(rb"\x02(.)\x11\x01(\x00\x00\xc0\xfe)", mp_table, re.DOTALL)
    (ioapic,) = (entry for entry in entries if entry[0] == 1)
    assert (ioapic[2:3], ioapic[4:8], ioapic[8:]) == (*mp_ioapic, bytes(4))
    assert [entry.hex() for entry in entries if entry[0] not in (0, 1)] == ["0406ff000001"]


def test_every_device_has_its_own_name_registers_and_line(tmp_path: Path) -> None:
    source = disassemble(found_tables(written(2, 8))[b"DSDT"][1], tmp_path)
    found = re.findall(
        r"Device \((V\w+)\)\s+\{\s+Name \(_HID, \"LNRO0005\"\).*\s+Name \(_UID, (\w+)\).*\s+"
        r"Name \(_CCA, One\).*\s+Name \(_CRS, ResourceTemplate \(\).*\s+\{\s+"
        r"Memory32Fixed \(ReadWrite,\s+(0x\w+),.*\s+0x00001000,.*\s+\)\s+"
        r"Interrupt \(ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, \)\s+\{\s+(0x\w+),",
        source,
    )
    numbers = {"Zero": 0, "One": 1}
    assert [
        (name, numbers.get(uid) or int(uid.replace("Zero", "0").replace("One", "1"), 16),
         int(base, 16), int(gsi, 16))
        for name, uid, base, gsi in found
    ] == [(f"V{index:03X}", index, *layout.virtio_slot(index)) for index in range(8)]


def test_the_other_devices(tmp_path: Path) -> None:
    source = disassemble(found_tables(written(3, rtc=True))[b"DSDT"][1], tmp_path)
    assert re.findall(r'"ACPI0007".*\s+Name \(_UID, (\w+)\)', source) == ["Zero", "One", "0x02"]
    ports = re.findall(
        r"Device \((\w+)\)\s+\{\s+Name \(_HID, \D*\"(\w+)\"[^{]*\{\s+"
        r"IO \(Decode16,\s+0x(\w+),.*\s+0x(\w+),.*\s+0x01,.*\s+0x(\w+),.*\s+\)\s+(\S+)",
        source,
    )
    assert ports == [
        ("COM1", "PNP0501", "03F8", "03F8", "08", "Interrupt"),
        ("PEVT", "QEMU0001", "0505", "0505", "01", "})"),
        ("RTC", "PNP0B00", "0070", "0070", "02", "})"),
    ]
    lines = re.findall(r"Interrupt \(.*ActiveHigh.*\s+\{\s+0x(\w+),", source)
    assert [int(line, 16) for line in lines] == [layout.SERIAL_IRQ, layout.GED_GSI]
    assert re.search(r"Name \(\\_S5, Package \(0x04\).*\s+\{\s+0x05,", source)


def test_a_clone_is_told_of_its_new_generation_by_a_line_of_its_own(tmp_path: Path) -> None:
    source = disassemble(found_tables(written())[b"DSDT"][1], tmp_path)
    (low, high) = re.findall(
        r"Device \(VGEN\)\s+\{\s+Name \(_HID, \"PYVM0001\"\).*\s+"
        r"Name \(_CID, Package \(0x02\).*\s+\{\s+\"VM_Gen_Counter\",\s+\"VMGENCTR\"\s+\}\)\s+"
        r"Name \(_DDN, \"VM_Gen_Counter\"\).*\s+"
        r"Name \(ADDR, Package \(0x02\).*\s+\{\s+(\w+),\s+(\w+)\s+\}\)",
        source,
    )[0]
    assert (int(low, 16), high) == (layout.VMGENID_GPA, "Zero")
    ((line, asked),) = re.findall(
        r"Device \(GED\)\s+\{\s+Name \(_HID, \"ACPI0013\".*\s+Name \(_UID, Zero\).*\s+"
        r"Name \(_CRS, ResourceTemplate \(\).*\s+\{\s+"
        r"Interrupt \(ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, \)\s+\{\s+(0x\w+),\s+"
        r"\}\s+\}\)\s+Method \(_EVT, 1, Serialized\).*\s+\{\s+If \(\(Arg0 == (0x\w+)\)\)\s+"
        r"\{\s+Notify \(\\_SB\.VGEN, 0x80\)",
        source,
    )
    assert int(line, 16) == int(asked, 16) == layout.GED_GSI
    lines = [layout.SERIAL_IRQ, layout.GED_GSI, *layout.VIRTIO_IRQS]
    assert len(set(lines)) == len(lines)
    reserved = [
        (gpa, gpa + length)
        for gpa, length, kind in e820_map([(0, RAM_BYTES)]) if kind == E820_TYPE_RESERVED
    ]
    assert any(
        layout.VMGENID_GPA in range(start, end) and layout.VMGENID_GPA + 15 in range(start, end)
        for start, end in reserved
    )
    # Its specification: a multiple of 8, in a page with nothing else that anybody maps.
    assert layout.VMGENID_GPA % 8 == 0
    page = layout.VMGENID_GPA // 4096
    assert page not in ((layout.ACPI_TABLES_END - 1) // 4096, layout.RESET_VECTOR // 4096)


def test_without_a_clock_there_is_none(tmp_path: Path) -> None:
    assert "PNP0B00" not in disassemble(found_tables(written())[b"DSDT"][1], tmp_path)


def test_tables_never_grow_into_the_kernel() -> None:
    memory = GuestMemory.over(bytearray(RAM_BYTES))
    devices = [VirtioMmioDevice(base=0xD000_0000, length=0x1000, gsi=5)] * 3000
    with pytest.raises(ValueError, match="do not fit"):
        write_acpi_tables(memory, vcpu_count=1, devices=devices)
    assert not any(memory.read(0, RAM_BYTES))
