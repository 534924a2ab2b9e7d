"""The decompressors by themselves, with inputs made large by repeating a part of them"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Iterable

from fuzz.source import Source
from fuzz.target import Target
from pyvmm.linux.compression import Compression, UnpackError, decompress, detect

_LIMIT_BYTES = 4 << 20
_MOST_BYTES = 4 << 20
_BY_PROGRAM = (Compression.ZSTD, Compression.LZO)


class DecompressTarget(Target):
    """At most the limit comes out, of whatever goes in, in a bounded time.

    A case is: a magic number, how often its last part is repeated, the length of that, the data.
    """

    max_bytes = 8 << 10
    limit_s = 5.0

    def seeds(self) -> Iterable[bytes]:
        """Return every format, small, and LZ4 that yields nothing."""
        text = b"some text, some text, some more text " * 20
        plain = [gzip.compress(text), lzma.compress(text), bz2.compress(text),
                 lzma.compress(text, lzma.FORMAT_ALONE),
                 b"\x02\x21\x4c\x18" + b"\5\0\0\0\x40abcd"]
        lz4 = b"\x02\x21\x4c\x18" + b"\5\0\0\0\x40abcd"
        return [*(bytes(4) + data for data in plain), b"\xff\xff\x0a\x00" + lz4,
                b"\xff\xff\x05\x00" + b"\x02\x21\x4c\x18" + b"\1\0\0\0\0"]

    def run(self, data: bytes) -> None:
        """Unpack what ``data`` describes."""
        source = Source(data)
        times, length = source.bits(16), source.bits(16)
        packed = source.rest()
        tail = packed[max(0, len(packed) - length) :]
        packed = (packed + tail * times)[:_MOST_BYTES]
        if detect(packed) in _BY_PROGRAM:
            return
        try:
            unpacked = decompress(packed, limit=_LIMIT_BYTES)
        except UnpackError:
            return
        assert len(unpacked) <= _LIMIT_BYTES


def make() -> Target:
    """Return the target."""
    return DecompressTarget()
