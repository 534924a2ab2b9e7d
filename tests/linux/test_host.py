"""Programs of the host."""

from __future__ import annotations

import struct

from pyvmm.linux import host


def elf(*segment_types: int) -> bytes:
    """A 64-bit ELF header and a program header of each type."""
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, len(segment_types))
    return bytes(header) + b"".join(struct.pack("<I52x", kind) for kind in segment_types)


def test_static_means_no_interpreter() -> None:
    assert host.is_static(elf(1, 1))
    assert not host.is_static(elf(1, 3))
    assert not host.is_static(b"#!/bin/sh\n" + bytes(64))
    assert not host.is_static(b"\x7fELF\x02")
