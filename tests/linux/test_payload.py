"""The kernel inside a bzImage."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct

import pytest

from pyvmm.linux import payload
from pyvmm.linux.compression import Compression, UnpackError

ELF = b"\x7fELF" + bytes(range(200))
SIZE = struct.pack("<I", len(ELF))


def bz_image(packed: bytes) -> bytes:
    """The least that has a payload: one boot sector, one setup sector, 8 bytes of code."""
    image = bytearray(1024)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 8, len(packed))
    return bytes(image) + bytes(8) + packed


@pytest.mark.parametrize(
    ("packed", "kind"),
    [
        # gzip ends with the size anyway; behind all others the kernel's build puts it.
        (gzip.compress(ELF), Compression.GZIP),
        (lzma.compress(ELF) + SIZE, Compression.XZ),
        (bz2.compress(ELF) + SIZE, Compression.BZIP2),
    ],
)
def test_extracts_the_elf_kernel(packed: bytes, kind: Compression) -> None:
    assert payload.extract_vmlinux(bz_image(packed)) == ELF
    assert payload.unpack(packed) == (kind, ELF)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"", "not a bzImage"),
        (bytes(4096), "not a bzImage"),
        (bz_image(b"MZ something else"), "compressed by no method known here"),
        (bz_image(b""), "compressed by no method known here"),
        (bz_image(gzip.compress(b"MZ..")), "holds no ELF image"),
        (bz_image(lzma.compress(ELF) + struct.pack("<I", 205)), "204 bytes instead of 205"),
        (bz_image(lzma.compress(ELF) + struct.pack("<I", 203)), "more than the limit of 203"),
        (bz_image(lzma.compress(ELF) + b"\xff" * 4), "4294967295 bytes; the limit is 536870912"),
        (bz_image(lzma.compress(ELF)[:-30]), "the limit is|damaged"),
    ],
)
def test_refuses_what_is_no_kernel(image: bytes, problem: str) -> None:
    with pytest.raises(UnpackError, match=problem):
        payload.extract_vmlinux(image)
