"""Unpack kernels, modules and initramfs files, within a limit.

The files are not trusted.  No more than ``limit`` bytes come out, whatever they claim, and no more
work is done than a ``Budget`` has.  gzip, xz, lzma and bzip2 are in the standard library, lz4 in
``lz4.py``.  zstd is there from Python 3.14 on.  Before that a program of the host unpacks it, as it
always does lzo.
"""

from __future__ import annotations

import bz2
import contextlib
import importlib
import lzma
import math
import os
import resource
import select
import shutil
import signal
import subprocess
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from pyvmm.errors import HostError, PyvmmError
from pyvmm.linux import lz4
from pyvmm.linux.formats import Compression, detect
from pyvmm.linux.host import install_command
from pyvmm.linux.work import LOOK_STEPS, Budget, WorkError

__all__ = ["Compression", "UnpackError", "decompress", "detect", "pieces"]

PIECE_BYTES = 1 << 20
"""Unpacked bytes are handed on in such pieces; LZ4 in blocks of up to 8 MiB."""
_XZ_MEMORY_BYTES = 256 << 20
"""The kernel's own scripts ask for a dictionary of at most 128 MiB."""
_FEED_BYTES = 64 << 10
_STEP_BYTES = 4096
"""Every so many unpacked bytes cost a step, beside the steps of the call that made them."""
_PROGRAM_TURN_S = 0.5
_PROGRAMS = {Compression.ZSTD: "zstd", Compression.LZO: "lzop"}


class UnpackError(PyvmmError):
    """Compressed data is damaged, cut off, too large or too much work; the text has no subject."""


class _Decompressor(Protocol):
    """The interface that the decompressors of bz2, lzma and zstd share."""

    @property
    def eof(self) -> bool:
        """True if the end of the compressed data was reached."""

    @property
    def needs_input(self) -> bool:
        """True if nothing more comes out before more goes in."""

    def decompress(self, data: bytes, /, max_length: int) -> bytes:
        """Return at most ``max_length`` unpacked bytes of ``data``, and keep the rest."""


def decompress(data: bytes, *, limit: int, budget: Budget | None = None) -> bytes:
    """Return ``data`` unpacked by the format of its first bytes, or as it is if they show none.

    Bytes after the compressed data are no error: a kernel has its unpacked size there.  UnpackError
    if it cannot be unpacked to at most ``limit`` bytes within ``budget``, HostError if this host
    has no program that could.
    """
    return b"".join(pieces(data, limit=limit, budget=budget))


def pieces(data: bytes, *, limit: int, budget: Budget | None = None) -> Iterator[bytes]:
    """Yield what ``decompress`` returns, a piece at a time, so that the caller may stop early.

    It raises as ``decompress`` does, perhaps after some pieces; ``limit`` is never exceeded.
    """
    kind = detect(data)
    left = limit
    budget = budget or Budget()
    try:
        with contextlib.closing(_open(kind, data, limit, budget)) as unpacked:
            for piece in unpacked:
                budget.spend(LOOK_STEPS + len(piece) // _STEP_BYTES)
                left -= len(piece)
                if left < 0:
                    break
                if piece:
                    yield piece
    except WorkError as error:
        raise UnpackError(f"{kind.value} data {error}") from error
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
        raise UnpackError(f"{kind.value} data is damaged: {error}") from error
    if left < 0:
        raise UnpackError(f"{kind.value} data unpacks to more than the limit of {limit} bytes")


def _open(
    kind: Compression, data: bytes, limit: int, budget: Budget
) -> Generator[bytes]:
    match kind:
        case Compression.NONE:
            return (piece for piece in (data,))
        case Compression.GZIP:
            return _gunzip(data)
        case Compression.XZ:
            return _by_library(lambda: _xz(lzma.FORMAT_XZ), data)
        case Compression.LZMA:
            return _by_library(lambda: _xz(lzma.FORMAT_ALONE), data)
        case Compression.BZIP2:
            return _by_library(bz2.BZ2Decompressor, data)
        case Compression.LZ4:
            return lz4.blocks(data, budget)
        case Compression.ZSTD if (zstd := _zstd_module()) is not None:
            return _by_library(lambda: zstd, data)
        case _:
            return _by_program(_PROGRAMS[kind], data, limit, budget)


def _xz(container: int) -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(format=container, memlimit=_XZ_MEMORY_BYTES)


def _gunzip(data: bytes) -> Generator[bytes]:
    """Unpack by zlib, whose interface differs.  It copies its unused input at every call."""
    unpacker = zlib.decompressobj(wbits=31)
    for at in range(0, len(data), _FEED_BYTES):
        packed = data[at : at + _FEED_BYTES]
        while packed and not unpacker.eof:
            yield unpacker.decompress(packed, PIECE_BYTES)
            packed = unpacker.unconsumed_tail
        if unpacker.eof:
            return
    while not unpacker.eof and (last := unpacker.decompress(b"", PIECE_BYTES)):
        yield last
    if not unpacker.eof:
        raise ValueError("it ends too early")


def _by_library(make: Callable[[], _Decompressor], data: bytes) -> Generator[bytes]:
    unpacker = make()
    for at in range(0, len(data), _FEED_BYTES):
        packed = data[at : at + _FEED_BYTES]
        while not unpacker.eof and (packed or not unpacker.needs_input):
            yield unpacker.decompress(packed, PIECE_BYTES)
            packed = b""
        if unpacker.eof:
            return
    raise ValueError("it ends too early")


def _zstd_module() -> _Decompressor | None:
    """Return a decompressor of ``compression.zstd``; None before Python 3.14."""
    try:
        module = importlib.import_module("compression.zstd")
    except ImportError:
        return None
    decompressor: _Decompressor = module.ZstdDecompressor()
    return decompressor


def _by_program(program: str, data: bytes, limit: int, budget: Budget) -> Generator[bytes]:
    """Yield the output of ``program -dc`` for ``data``, up to one byte over ``limit``.

    Its exit status is no help: these programs complain about bytes after the data, too.  The kernel
    limits its CPU time.
    """
    if shutil.which(program) is None:
        newer = ", or use Python 3.14, which unpacks zstd itself" if program == "zstd" else ""
        raise HostError(f"{program} is missing; run: {install_command([program])}{newer}")
    with contextlib.ExitStack() as stack:
        packed = stack.enter_context(os.fdopen(os.memfd_create("pyvmm-packed"), "r+b"))
        packed.write(data)
        packed.seek(0)
        process = stack.enter_context(subprocess.Popen(
            [program, "-dcq"], stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ))
        stack.callback(process.kill)
        output = process.stdout
        assert output is not None, "a pipe was asked for"
        cpu_s = math.ceil(budget.cpu_s * budget.slowness())
        with contextlib.suppress(ProcessLookupError):  # it has ended
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (cpu_s, cpu_s))
        done = 0
        while done <= limit:
            while not select.select([output], [], [], _PROGRAM_TURN_S)[0]:
                budget.look()
            some = os.read(output.fileno(), PIECE_BYTES)
            if not some:
                if process.wait() in (-signal.SIGXCPU, -signal.SIGKILL):
                    raise WorkError(f"takes more than the limit of {cpu_s} s of CPU time")
                break
            done += len(some)
            yield some
        if not done:
            raise ValueError(f"{program} cannot read it")
