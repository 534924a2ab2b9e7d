"""The kernel inside a bzImage: its place, its compression, and unpacking it.

Documentation/arch/x86/boot.rst: ``setup_sects`` at 0x1f1; ``payload_offset`` and ``payload_length``
at 0x248, relative to the end of the setup sectors.  The payload ends with the unpacked size
(arch/x86/boot/compressed/mkpiggy.c), by which a cut-off one is noticed.
"""

from __future__ import annotations

import struct

from pyvmm.linux.compression import Compression, UnpackError, decompress, detect
from pyvmm.linux.work import PATIENT_CPU_S, Budget

HEAD_BYTES = 0x250
"""Bytes of a bzImage's start for ``locate``."""
MAX_KERNEL_BYTES = 512 << 20

_SECTOR = 512
_SIZE = struct.Struct("<I")


def locate(head: bytes) -> tuple[int, int]:
    """Return ``(offset, length)`` of the payload of a bzImage that starts with ``head``.

    UnpackError if that is not a bzImage.  The header's numbers are not checked.
    """
    if len(head) < HEAD_BYTES or head[0x202:0x206] != b"HdrS":
        raise UnpackError("not a bzImage")
    offset, length = struct.unpack_from("<II", head, 0x248)
    return offset + ((head[0x1F1] or 4) + 1) * _SECTOR, length


def unpack(payload: bytes, budget: Budget | None = None) -> tuple[Compression, bytes]:
    """Return the compression of ``payload`` and the ELF kernel in it; UnpackError if it has
    none."""
    kind = detect(payload)
    if kind is Compression.NONE or len(payload) < _SIZE.size:
        raise UnpackError("its payload is compressed by no method known here")
    (size_bytes,) = _SIZE.unpack_from(payload, len(payload) - _SIZE.size)
    if size_bytes > MAX_KERNEL_BYTES:
        raise UnpackError(f"its payload unpacks to {size_bytes} bytes; "
                          f"the limit is {MAX_KERNEL_BYTES}")
    kernel = decompress(payload, limit=size_bytes, budget=budget)
    if len(kernel) != size_bytes:
        raise UnpackError(f"its payload is cut off: {len(kernel)} bytes instead of {size_bytes}")
    if kernel[:4] != b"\x7fELF":
        raise UnpackError("its payload holds no ELF image")
    return kind, kernel


def extract_vmlinux(image: bytes) -> bytes:
    """Return the ELF kernel inside the bzImage ``image``; UnpackError if there is none.

    This is for downloaded kernels, so it may take longer than a look.
    """
    offset, length = locate(image)
    return unpack(image[offset : offset + length], Budget(cpu_s=PATIENT_CPU_S))[1]
