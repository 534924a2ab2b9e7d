"""Unpacking what kernels, modules and initramfs files are compressed with, within a limit.

The files are not trusted: no more than ``limit`` bytes come out, whatever they claim.  gzip, xz,
lzma and bzip2 are in the standard library, lz4 in ``lz4.py``; zstd is there from Python 3.14 on,
and before that, as lzo always, a program of the host does it.
"""

from __future__ import annotations

import bz2
import contextlib
import enum
import importlib
import lzma
import os
import shutil
import subprocess
import zlib
from typing import Protocol

from pyvmm.errors import HostError, PyvmmError
from pyvmm.linux import lz4
from pyvmm.linux.host import install_command

_XZ_MEMORY_BYTES = 256 << 20
"""The kernel's own scripts ask for a dictionary of at most 128 MiB."""
_READ_BYTES = 1 << 20


class UnpackError(PyvmmError):
    """Compressed data is damaged, cut off, or larger than the limit; the text has no subject."""


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
    (b"\x1f\x8b", Compression.GZIP),
    (b"\xfd7zXZ\0", Compression.XZ),
    (lz4.MAGIC, Compression.LZ4),
    (b"\x28\xb5\x2f\xfd", Compression.ZSTD),
    (b"BZh", Compression.BZIP2),
    (b"\x5d\0\0", Compression.LZMA),
    (b"\x89LZO\0\r\n\x1a\n", Compression.LZO),
)
_PROGRAMS = {Compression.ZSTD: "zstd", Compression.LZO: "lzop"}


class _Decompressor(Protocol):
    """What the standard library's decompressors have in common."""

    @property
    def eof(self) -> bool:
        """Whether the end of the compressed data was reached."""

    def decompress(self, data: bytes, /, max_length: int) -> bytes:
        """At most ``max_length`` bytes of what ``data`` unpacks to."""


def detect(head: bytes) -> Compression:
    """The format of a file that starts with ``head``; NONE if it is none of these."""
    return next((kind for magic, kind in _MAGICS if head.startswith(magic)), Compression.NONE)


def decompress(data: bytes, *, limit: int) -> bytes:
    """``data`` unpacked by the format its first bytes show; ``data`` itself if they show none.

    Bytes after the compressed data are no error: a kernel has its unpacked size there.
    UnpackError if it cannot be unpacked to at most ``limit`` bytes, HostError if this host has
    no program that could.
    """
    kind = detect(data)
    try:
        match kind:
            case Compression.NONE:
                unpacked = data
            case Compression.GZIP:
                unpacked = _by_library(zlib.decompressobj(wbits=31), data, limit)
            case Compression.XZ:
                unpacked = _by_library(_xz(lzma.FORMAT_XZ), data, limit)
            case Compression.LZMA:
                unpacked = _by_library(_xz(lzma.FORMAT_ALONE), data, limit)
            case Compression.BZIP2:
                unpacked = _by_library(bz2.BZ2Decompressor(), data, limit)
            case Compression.LZ4:
                unpacked = lz4.decompress(data, limit=limit)
            case Compression.ZSTD if (zstd := _zstd_module()) is not None:
                unpacked = _by_library(zstd, data, limit)
            case _:
                unpacked = _by_program(_PROGRAMS[kind], data, limit)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
        raise UnpackError(f"{kind.value} data is damaged: {error}") from error
    if len(unpacked) > limit:
        raise UnpackError(f"{kind.value} data unpacks to more than the limit of {limit} bytes")
    return unpacked


def _xz(container: int) -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(format=container, memlimit=_XZ_MEMORY_BYTES)


def _by_library(decompressor: _Decompressor, data: bytes, limit: int) -> bytes:
    unpacked = decompressor.decompress(data, limit + 1)
    if not decompressor.eof and len(unpacked) <= limit:
        raise ValueError("it ends too early")
    return unpacked


def _zstd_module() -> _Decompressor | None:
    """A decompressor of ``compression.zstd``, where Python has it (3.14)."""
    try:
        module = importlib.import_module("compression.zstd")
    except ImportError:
        return None
    decompressor: _Decompressor = module.ZstdDecompressor()
    return decompressor


def _by_program(program: str, data: bytes, limit: int) -> bytes:
    """What ``program -dc`` makes of ``data``, read up to one byte over ``limit``.

    Its exit status is no help: these programs complain about bytes after the data, too.
    """
    if shutil.which(program) is None:
        raise HostError(f"{program} is missing; run: {install_command([program])}")
    with contextlib.ExitStack() as stack:
        packed = stack.enter_context(os.fdopen(os.memfd_create("pyvmm-packed"), "r+b"))
        packed.write(data)
        packed.seek(0)
        process = stack.enter_context(subprocess.Popen(
            [program, "-dcq"], stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ))
        stack.callback(process.kill)
        unpacked = bytearray()
        while len(unpacked) <= limit:
            if process.stdout is None or not (some := process.stdout.read(_READ_BYTES)):
                break
            unpacked += some
        if not unpacked:
            raise ValueError(f"{program} cannot read it")
    return bytes(unpacked)
