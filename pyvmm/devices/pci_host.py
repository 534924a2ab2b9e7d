"""A PCI bus with nothing on it but its host bridge.

It has configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2 "Software Generation
of Configuration Transactions").

There is no PCI here.  But a kernel that knows PCI takes a machine without a way to its
configuration space for a broken one.  It says so on every boot, ``quiet`` or not: "PCI: Fatal: No
config space access function found".  Linux believes in the mechanism once it has seen a host bridge
(arch/x86/pci/direct.c).  ACPI names no bus, so a kernel with ACPI looks no further; one without
ACPI finds only the bridge.
"""

from __future__ import annotations

_ENABLE = 1 << 31
_ADDRESS_BITS = 0x80FF_FFFC  # all other bits are reserved
_HEADER = (
    0x8086.to_bytes(2, "little")  # Intel's
    + 0x0D57.to_bytes(2, "little")  # for virtual machines: Firecracker and Cloud Hypervisor have it
    + bytes(4)
    + bytes((0, 0, 0x00, 0x06))  # revision; interface, subclass and class: a host bridge
)
_DATA = 4  # CONFIG_DATA's offset


class PciHost:
    """CONFIG_ADDRESS and CONFIG_DATA: a BusDevice of 8 ports.  The bridge cannot be written."""

    LENGTH = 8

    def __init__(self) -> None:
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        """BusDevice: return the address, or the register that it selects; all ones without a
        device."""
        if offset >= _DATA:
            if self._address & _ENABLE:
                return self._configuration((self._address & 0xFC) + offset - _DATA, size)
        elif (offset, size) == (0, 4):
            return self._address
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice: only 32 bits at once are an address; other accesses belong to other
        devices."""
        if (offset, size) == (0, 4):
            self._address = value & _ADDRESS_BITS

    def save(self) -> dict[str, object]:
        """Return the state of CONFIG_ADDRESS."""
        return {"address": self._address}

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("PCI host bridge", data)
        address = fields.integer("address", 0, _ADDRESS_BITS)
        if address & ~_ADDRESS_BITS:
            raise fields.error("address", f"has bits outside {_ADDRESS_BITS:#x}")
        fields.end()
        self._address = address

    def _configuration(self, register: int, size: int) -> int:
        if self._address & 0xFF_FF00:  # another bus, device or function
            return (1 << 8 * size) - 1
        return int.from_bytes(_HEADER[register : register + size], "little")
