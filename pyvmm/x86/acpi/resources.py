"""Resource descriptors for a device's ``_CRS``: its addresses, ports and interrupts.

ACPI 6.5, section 6.4 "Resource Data Types for ACPI".  Bad arguments are programming errors:
struct.error or ValueError.
"""

from __future__ import annotations

import struct

from pyvmm.x86.acpi import aml

_IO_PORT = struct.Struct("<BBHHBB")  # 6.4.2.5 I/O Port Descriptor
_MEMORY32_FIXED = struct.Struct("<BHBII")  # 6.4.3.4 32-Bit Fixed Memory Range Descriptor
_INTERRUPT = struct.Struct("<BHBBI")  # 6.4.3.6 Extended Interrupt Descriptor, of one interrupt
_LARGE_HEADER_BYTES = 3  # tag and 16-bit length, which the length does not count

_IO_PORT_TAG = 0x47
_MEMORY32_FIXED_TAG = 0x86
_INTERRUPT_TAG = 0x89
_END_TAG = b"\x79\x00"  # 6.4.2.9; a checksum of 0 always matches

_DECODES_16_BITS = 1 << 0
_WRITABLE = 1 << 0
_CONSUMER, _EDGE_TRIGGERED, _ACTIVE_LOW, _SHARED = 1 << 0, 1 << 1, 1 << 2, 1 << 3


def io_ports(first: int, count: int) -> bytes:
    """``count`` I/O ports (at most 255) from ``first``, all 16 address bits decoded."""
    return _IO_PORT.pack(_IO_PORT_TAG, _DECODES_16_BITS, first, first, 1, count)


def memory32_fixed(base: int, length: int) -> bytes:
    """``length`` bytes of device memory, readable and writable, at ``base`` below 4 GiB."""
    size = _MEMORY32_FIXED.size - _LARGE_HEADER_BYTES
    return _MEMORY32_FIXED.pack(_MEMORY32_FIXED_TAG, size, _WRITABLE, base, length)


def interrupt(
    gsi: int, *, edge: bool = True, active_low: bool = False, shared: bool = False
) -> bytes:
    """Return the interrupt line ``gsi``; the defaults are those of the ISA bus.

    Unlike the short IRQ descriptor, this one has trigger and polarity itself, so Linux does not
    look for them in the MADT's overrides.
    """
    flags = _CONSUMER
    flags |= _EDGE_TRIGGERED if edge else 0
    flags |= _ACTIVE_LOW if active_low else 0
    flags |= _SHARED if shared else 0
    return _INTERRUPT.pack(_INTERRUPT_TAG, _INTERRUPT.size - _LARGE_HEADER_BYTES, flags, 1, gsi)


def template(*descriptors: bytes) -> bytes:
    """Return the Buffer of ``descriptors`` for ``_CRS``."""
    return aml.buffer(b"".join(descriptors) + _END_TAG)
