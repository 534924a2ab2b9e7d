"""Tell the compression of kernels, modules and initramfs files by their first bytes.

Apart from ``compression``, which unpacks them, because ``pyvmm run`` looks at an initrd before it
boots and has no use for the libraries.
"""

from __future__ import annotations

import enum

GZIP_MAGIC = b"\x1f\x8b"
LZ4_MAGIC = b"\x02\x21\x4c\x18"
"""The magic of the "legacy frame" (``lz4 -l``)."""


class Compression(enum.Enum):
    """Formats by the names that Linux's configuration gives them (CONFIG_KERNEL_...)."""

    NONE = "none"
    GZIP = "GZIP"
    XZ = "XZ"
    LZ4 = "LZ4"
    ZSTD = "ZSTD"
    BZIP2 = "BZIP2"
    LZMA = "LZMA"
    LZO = "LZO"


_MAGICS = (
    (GZIP_MAGIC, Compression.GZIP),
    (b"\xfd7zXZ\0", Compression.XZ),
    (LZ4_MAGIC, Compression.LZ4),
    (b"\x28\xb5\x2f\xfd", Compression.ZSTD),
    (b"BZh", Compression.BZIP2),
    (b"\x5d\0\0", Compression.LZMA),
    (b"\x89LZO\0\r\n\x1a\n", Compression.LZO),
)
MAGIC_BYTES = max(len(magic) for magic, _ in _MAGICS)
"""Bytes of a file's start for ``detect``."""


def detect(head: bytes) -> Compression:
    """Return the format of a file that starts with ``head``; NONE if it is none of these."""
    return next((kind for magic, kind in _MAGICS if head.startswith(magic)), Compression.NONE)
