"""Data that takes long to read for what it yields: the worst of each format, as long as wanted."""

from __future__ import annotations

import bz2
import lzma


def bits(*fields: tuple[int, int]) -> str:
    """``(value, width)`` as deflate has them: the lowest bit first."""
    return "".join(f"{value:0{width}b}"[::-1] for value, width in fields)


def empty_deflate_block() -> str:
    """A block with Huffman codes of its own and nothing in it (RFC 1951, 3.2.7), 90 bits."""
    # The code lengths of 18 (a run of zeros) and 1, in the order of the format.
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    lengths = [(int(symbol in (18, 1)), 3) for symbol in order]
    head = bits((0, 1), (2, 2), (0, 5), (0, 5), (len(order) - 4, 4), *lengths)
    # 256 literals without a code, the end of the block and one distance with a code of one bit.
    codes = "1" + bits((138 - 11, 7)) + "1" + bits((118 - 11, 7)) + "0" + "0"
    return head + codes + "0"


def gzip_nothing(length: int) -> bytes:
    """Blocks of gzip that yield nothing, and have tables to be built."""
    unit = empty_deflate_block() * 8
    data = bytes(int(unit[at : at + 8][::-1], 2) for at in range(0, len(unit), 8))
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + data * (length // len(data))


def gzip_stored(length: int) -> bytes:
    """Stored blocks of gzip of no bytes."""
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\0\0\0\xff\xff" * (length // 5)


def lz4_nothing(length: int) -> bytes:
    """Blocks of LZ4 that yield nothing."""
    return b"\x02\x21\x4c\x18" + b"\x01\0\0\0\0" * (length // 5)


def lz4_one_byte(length: int) -> bytes:
    """Blocks of LZ4 that yield a byte."""
    return b"\x02\x21\x4c\x18" + b"\x02\0\0\0\x10a" * (length // 6)


def lz4_short_matches(length: int) -> bytes:
    """Blocks of LZ4 of the shortest matches."""
    block = b"\x10a\x01\0" + b"\0\x01\0" * 500_000 + b"\x10a"
    return b"\x02\x21\x4c\x18" + (len(block).to_bytes(4, "little") + block) * (length // len(block))


def lz4_long_lengths(length: int) -> bytes:
    """A length that has no end."""
    return b"\x02\x21\x4c\x18" + length.to_bytes(4, "little") + b"\xff" * length


def xz_small_chunks(length: int) -> bytes:
    """LZMA2 chunks of a byte each, stored."""
    whole = lzma.compress(b"a" * 10)
    start = 12 + (whole[12] + 1) * 4  # a stream's header, a block's
    return whole[:start] + b"\x01\0\0a" + b"\x02\0\0a" * (length // 4)


def bzip2_small_blocks(length: int) -> bytes:
    """Blocks of bzip2 of a byte each, with tables to be built."""
    whole = bz2.compress(b"a")
    text = f"{int.from_bytes(whole, 'big'):0{len(whole) * 8}b}"
    block = text[32 : text.index(f"{0x177245385090:048b}")]
    unit = int(block * 8, 2).to_bytes(len(block), "big")
    return whole[:4] + unit * (length // len(unit))


def zstd_nothing(length: int) -> bytes:
    """Raw blocks of zstd of no bytes (RFC 8878, 3.1.1)."""
    return b"\x28\xb5\x2f\xfd\0\x58" + b"\0\0\0" * (length // 3)


SLOW = {
    "gzip, nothing": gzip_nothing, "gzip, stored": gzip_stored, "LZ4, nothing": lz4_nothing,
    "LZ4, one byte": lz4_one_byte, "LZ4, short matches": lz4_short_matches,
    "xz, small chunks": xz_small_chunks, "bzip2, small blocks": bzip2_small_blocks,
}
