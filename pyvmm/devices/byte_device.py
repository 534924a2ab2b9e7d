"""Eight-bit devices on a bus that allows wider accesses."""

from __future__ import annotations


class ByteDevice:
    """A device of 8-bit registers.  A wider access is a row of byte accesses, as on the ISA bus."""

    def read_byte(self, offset: int) -> int:
        """Read the register at ``offset``."""
        raise NotImplementedError

    def write_byte(self, offset: int, value: int) -> None:
        """Write the register at ``offset``."""
        raise NotImplementedError

    def read(self, offset: int, size: int) -> int:
        """BusDevice: read ``size`` registers from ``offset``, the lowest into the low byte."""
        if size == 1:
            return self.read_byte(offset)
        value = 0
        for i in range(size):
            value |= self.read_byte(offset + i) << 8 * i
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice: write the low byte to ``offset``, the next to the register after it, and so
        on."""
        if size == 1:
            self.write_byte(offset, value)
            return
        for i in range(size):
            self.write_byte(offset + i, value >> 8 * i & 0xFF)
