"""ACPI: the tables by which a PC's firmware describes the machine, written at boot."""

from pyvmm.x86.acpi.dsdt import VirtioMmioDevice
from pyvmm.x86.acpi.tables import write_acpi_tables

__all__ = ["VirtioMmioDevice", "write_acpi_tables"]
