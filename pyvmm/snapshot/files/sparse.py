"""Sparse files: their CRC, and copies that keep the holes.

The CRC covers each block of 64 KiB that is not all zero, behind its number.  So holes cost nothing,
and a copy by a tool that fills them has the same CRC.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator

_BLOCK = 64 << 10
_ZEROES = bytes(_BLOCK)
_NUMBER = struct.Struct("<Q")
# File systems without SEEK_DATA: everything is data.
_NO_HOLES = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})


def sparse_crc(fd: int) -> int:
    """Return the CRC32 of the file ``fd``; OSError."""
    crc = 0
    for number, block in _blocks(fd):
        crc = zlib.crc32(block, zlib.crc32(_NUMBER.pack(number), crc))
    return crc


def copy_sparse(source: int, target: int) -> int:
    """Copy the file ``source`` into the empty file ``target``, with holes; return the CRC32 of what
    was read.  OSError."""
    crc = 0
    os.ftruncate(target, os.fstat(source).st_size)
    for number, block in _blocks(source):
        crc = zlib.crc32(block, zlib.crc32(_NUMBER.pack(number), crc))
        at, view = number * _BLOCK, memoryview(block)
        while view:
            count = os.pwrite(target, view, at)
            at, view = at + count, view[count:]
    return crc


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each part of the file ``fd`` that is no hole; OSError."""
    size = os.fstat(fd).st_size
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            if error.errno not in _NO_HOLES:
                raise
            start, end = end, size
        yield start, end


def _blocks(fd: int) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the content of each block that is not all zero."""
    size = os.fstat(fd).st_size
    at = 0
    for start, end in data_ranges(fd):
        at = max(at, start // _BLOCK * _BLOCK)
        while at < end:
            block = _read(fd, min(_BLOCK, size - at), at)
            if block != _ZEROES[: len(block)]:
                yield at // _BLOCK, block
            at += _BLOCK


def _read(fd: int, length: int, at: int) -> bytes:
    pieces = []
    while length:
        piece = os.pread(fd, length, at)
        if not piece:
            raise OSError(errno.EIO, "the file has become shorter")
        pieces.append(piece)
        at, length = at + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
