"""ACPI: the tables by which a PC's firmware describes the machine, written at boot."""

from pyvmm.x86.acpi.dsdt import S5_SLEEP_TYPE, VirtioMmioDevice
from pyvmm.x86.acpi.tables import RESET_VALUE, write_acpi_tables

__all__ = ["RESET_VALUE", "S5_SLEEP_TYPE", "VirtioMmioDevice", "write_acpi_tables"]
