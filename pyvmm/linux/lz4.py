"""The LZ4 "legacy frame" in which Linux packs kernels (``lz4 -l``), unpacked in pure Python.

A magic number comes first, then blocks: a 32-bit length and that many bytes of LZ4 block format.
Each unpacks to at most 8 MiB.  The formats are in the LZ4 project's doc/lz4_Frame_format.md and
doc/lz4_Block_format.md.
"""

from __future__ import annotations

from collections.abc import Generator

from pyvmm.linux.formats import LZ4_MAGIC as MAGIC
from pyvmm.linux.work import Budget

_MAX_BLOCK_BYTES = 8 << 20
_MIN_MATCH = 4
_LONG = 15
"""A length of four bits that more bytes of length follow."""
_GATHERED_BYTES = 64 << 10
_TURN = 1024
"""Sequences that are unpacked between two looks at the budget."""
_BLOCK_STEPS = 4
"""The cost of a block, whatever is in it."""


def blocks(data: bytes, budget: Budget) -> Generator[bytes]:
    """Yield the blocks of ``data``, a legacy frame, one at a time; small ones are gathered.

    Bytes after the last block that are too few for a block are ignored: Linux puts the unpacked
    size there.  ValueError for any other breach of the format, WorkError if it takes more than
    ``budget``.
    """
    if not data.startswith(MAGIC):
        raise ValueError("no LZ4 legacy frame")
    at = len(MAGIC)
    small = bytearray()
    while len(data) - at > 4:
        length = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if length > len(data) - at:
            raise ValueError(f"a block of {length} bytes at byte {at} is cut off")
        small += decompress_block(data[at : at + length], budget)
        at += length
        if len(small) >= _GATHERED_BYTES:
            yield bytes(small)
            small.clear()
    yield bytes(small)


def decompress_block(data: bytes, budget: Budget) -> bytearray:
    """Return one LZ4 block, unpacked; ValueError unless it is whole and makes at most 8 MiB.

    WorkError if it takes more than ``budget``: a sequence is a step.
    """
    out = bytearray()
    at, end = 0, len(data)
    try:
        step = 0
        while True:
            step += 1
            if step == _TURN:
                budget.spend(step)
                step = 0
            token = data[at]
            at += 1
            literals = token >> 4
            if literals == _LONG:
                more, at = _more_length(data, at)
                literals += more
            out += data[at : at + literals]
            at += literals
            if at >= end:
                budget.spend(step + _BLOCK_STEPS)
                break
            offset = data[at] | data[at + 1] << 8
            at += 2
            length = token & _LONG
            if length == _LONG:
                more, at = _more_length(data, at)
                length += more
            length += _MIN_MATCH
            start = len(out) - offset
            if offset == 0 or start < 0 or start + offset + length > _MAX_BLOCK_BYTES:
                raise ValueError(f"a match {offset} bytes back, {length} long, leaves its block")
            if length <= offset:
                out += out[start : start + length]
            else:  # the match runs into its own output, whose first bytes repeat
                out += (out[start:] * (length // offset + 1))[:length]
    except IndexError as error:
        raise ValueError("a block ends too early") from error
    if at > end or len(out) > _MAX_BLOCK_BYTES:
        raise ValueError("a block's literals run past its end")
    return out


def _more_length(data: bytes, at: int) -> tuple[int, int]:
    """Return the rest of a long length, ended by a byte below 255, and the index behind it."""
    total = 0
    while data[at] == 0xFF:
        total += 0xFF
        at += 1
        if total > _MAX_BLOCK_BYTES:
            raise ValueError("a length leaves its block")
    return total + data[at], at + 1
