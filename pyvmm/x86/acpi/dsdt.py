"""The DSDT's definition block: the devices of the machine that cannot be found by probing."""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm.devices.serial import Serial
from pyvmm.startup.types import Record
from pyvmm.x86 import layout
from pyvmm.x86.acpi import aml, resources

_GENERATION_COUNTER = "VGEN"
_ID_HAS_CHANGED = 0x80  # the first value that is the device's own to give a meaning


class VirtioMmioDevice(Record):
    """A virtio-mmio transport: ``length`` bytes of registers at ``base``, interrupting ``gsi``.

    ``gsi`` is an edge-triggered, active high line.
    """

    base: int
    length: int
    gsi: int


def definition_block(vcpu_count: int, devices: Sequence[VirtioMmioDevice], *, rtc: bool) -> bytes:
    """Return the DSDT's AML without the table's header; arguments as of ``write_acpi_tables``."""
    terms = [_processor(uid) for uid in range(vcpu_count)]
    terms.append(_uart())
    terms.append(_pvpanic())
    if rtc:
        terms.append(_rtc())
    terms += [_virtio_mmio(index, device) for index, device in enumerate(devices)]
    terms += [_generation_counter(), _event_device()]
    # 7.4.2 \_Sx: of the four elements a hardware-reduced platform uses the first.
    s5 = aml.package(*map(aml.integer, (layout.S5_SLEEP_TYPE, 0, 0, 0)))
    return aml.scope("\\_SB", *terms) + aml.name("\\_S5", s5)


def _processor(uid: int) -> bytes:
    """8.4 Declaring Processors; ``uid`` is that of the vCPU's entry in the MADT."""
    return aml.device(
        f"C{uid:03X}",
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", aml.integer(uid)),
    )


def _uart() -> bytes:
    """The 16550 at COM1.  Without this entry a hardware-reduced guest does not know its
    interrupt."""
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", resources.template(
            resources.io_ports(layout.SERIAL_PORT, Serial.LENGTH),
            resources.interrupt(layout.SERIAL_IRQ),
        )),
    )


def _pvpanic() -> bytes:
    """The port by which a guest says that it panicked: QEMU's docs/specs/pvpanic."""
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", resources.template(resources.io_ports(layout.PVPANIC_PORT, 1))),
    )


def _rtc() -> bytes:
    """The CMOS clock, which tells the time and never interrupts."""
    return aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", resources.template(
            resources.io_ports(layout.RTC_INDEX, layout.RTC_DATA + 1 - layout.RTC_INDEX)
        )),
    )


def _generation_counter() -> bytes:
    """Microsoft's Virtual Machine Generation ID: 16 bytes of RAM that change with each clone.

    Windows knows it by the longer _CID, Linux by either.  The address is in two halves.
    """
    return aml.device(
        _GENERATION_COUNTER,
        aml.name("_HID", aml.string("PYVM0001")),
        aml.name("_CID", aml.package(aml.string("VM_Gen_Counter"), aml.string("VMGENCTR"))),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(
            aml.integer(layout.VMGENID_GPA & 0xFFFF_FFFF), aml.integer(layout.VMGENID_GPA >> 32)
        )),
    )


def _event_device() -> bytes:
    """5.6.9 Interrupt-signaled ACPI Events: the only events of a hardware-reduced platform.

    The one event is that the machine has a new generation ID.
    """
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", resources.template(resources.interrupt(layout.GED_GSI))),
        aml.method(
            "_EVT",
            aml.if_equal(
                aml.FIRST_ARGUMENT, aml.integer(layout.GED_GSI),
                aml.notify(f"\\_SB.{_GENERATION_COUNTER}", _ID_HAS_CHANGED),
            ),
            arguments=1,
        ),
    )


def _virtio_mmio(index: int, device: VirtioMmioDevice) -> bytes:
    """A virtio-mmio transport, by the ID that Linux and QEMU know: LNRO0005."""
    return aml.device(
        f"V{index:03X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", resources.template(
            resources.memory32_fixed(device.base, device.length),
            resources.interrupt(device.gsi),
        )),
    )
