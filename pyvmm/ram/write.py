"""Guest RAM into a file or a memfd: sparse, with a CRC32 for every MiB, without copies."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from pyvmm.errors import HostError
from pyvmm.memory import GuestMemory, Region
from pyvmm.ram.compare import differing_runs
from pyvmm.ram.image import RamImage, new_memfd
from pyvmm.ram.pages import held_runs, own_runs
from pyvmm.ram.runs import USUAL_RUNS, Run, coarser, parts_in_regions, total
from pyvmm.startup.types import Record

CHUNK = 1 << 20
"""Bytes under one CRC32."""
_BLOCK = 64 << 10
"""Bytes that become a hole if all are zero."""
_ZEROES = bytes(_BLOCK)


class Written(Record, kw_only=False):
    """An image that was written: ``held_bytes`` of data, the rest is holes.

    ``crcs`` has a CRC32 for each chunk that is not all zero.  Of a diff it covers only the bytes in
    ``runs``, one behind the other; of a whole image, whose ``runs`` is None, all of the chunk.
    """

    held_bytes: int
    crcs: dict[int, int]
    runs: tuple[Run, ...] | None


def write_ram(memory: GuestMemory, fd: int, *, over: RamImage | None = None) -> Written:
    """Write RAM into the empty file ``fd``, all of it or only where it differs from ``over``.

    Nobody may use RAM meanwhile.  A byte's offset is its position: regions follow without gaps.
    OSError, as ENOSPC; HostError.  A diff has at most USUAL_RUNS runs, with neighbours of the pages
    that differ if need be.
    """
    return RamWriter(memory, fd, over=over).write()


def image_in_memory(memory: GuestMemory) -> RamImage:
    """Return an image of RAM in a sealed memfd; nobody may use the RAM.  HostError.

    RAM over an image that never changes needs only its own pages: they become one more layer, if
    they are not too scattered.
    """
    base = memory.image
    fd = new_memfd(memory.size_bytes)
    try:
        held = held_runs(memory)
        if isinstance(base, RamImage) and base.room:
            runs = coarser(own_runs(memory), memory.size_bytes, base.room)
            if total(runs) <= total(held) // 2:
                RamWriter(memory, fd).copy(runs)
                return base.over_memfd(fd, runs)
        RamWriter(memory, fd).copy(held)
        return RamImage.from_memfd(fd, memory.size_bytes)
    except OSError as error:
        os.close(fd)
        raise HostError(f"cannot keep RAM in memory: {error}") from error
    except BaseException:
        os.close(fd)
        raise


def chunk_crcs(fd: int, size_bytes: int, runs: Sequence[Run] | None) -> Iterator[tuple[int, int]]:
    """Yield number and CRC32 of each chunk of an image in ``fd``, as ``Written.crcs`` has them.

    Chunks that are all zero have one, too, or none: ``zero_crc`` tells theirs.  OSError.
    """
    buffer = bytearray(CHUNK)
    for chunk, parts in _by_chunk(((0, size_bytes),) if runs is None else runs):
        crc = 0
        for offset, length in parts:
            with memoryview(buffer)[:length] as view:
                got = os.preadv(fd, [view], offset)
                if got != length:
                    raise HostError(f"the image of RAM ends at {offset + got}")
                crc = zlib.crc32(view, crc)
        yield chunk, crc


def zero_crc(length: int) -> int:
    """Return the CRC32 of ``length`` zeroes."""
    return _crc_of_zeroes(length, 0)


def _crc_of_zeroes(length: int, crc: int) -> int:
    while length:
        step = min(length, _BLOCK)
        crc = zlib.crc32(_ZEROES if step == _BLOCK else memoryview(_ZEROES)[:step], crc)
        length -= step
    return crc


def _by_chunk(runs: Iterable[Run]) -> Iterator[tuple[int, list[Run]]]:
    """Yield the number of each chunk that ``runs`` touch, and the parts of them in it."""
    number, parts = -1, list[Run]()
    for offset, length in runs:
        end = offset + length
        while offset < end:
            chunk = offset // CHUNK
            stop = min(end, (chunk + 1) * CHUNK)
            if chunk != number:
                if parts:
                    yield number, parts
                number, parts = chunk, []
            parts.append((offset, stop - offset))
            offset = stop
    if parts:
        yield number, parts


class RamWriter:
    """One writing of ``memory`` into ``fd``, as ``write_ram`` does it.

    Once it is made, ``write`` needs no lock of the C library's: a forked child may call it.  If RAM
    is not mapped over ``over``, as after a checkpoint, both are compared when it is made.
    """

    def __init__(
        self,
        memory: GuestMemory,
        fd: int,
        *,
        over: RamImage | None = None,
        most_runs: int = USUAL_RUNS,
    ) -> None:
        self._most_runs = most_runs
        self._memory = memory
        self._fd = fd
        self._is_diff = over is not None
        self._runs: Sequence[Run] | None = None
        if over is not None and (memory.image is None or memory.image.layers != over.layers):
            self._runs = differing_runs(memory, over)
        self._held_bytes = 0
        self._differ: Callable[[int, bytes, int], int] = ctypes.CDLL(None).memcmp
        self._differ.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)

    def write(self, *, before_chunk: Callable[[], None] | None = None) -> Written:
        """Write; call ``before_chunk`` before each chunk that may hold data.  OSError."""
        size_bytes, is_diff = self._memory.size_bytes, self._is_diff
        os.ftruncate(self._fd, size_bytes)
        if is_diff:
            own = own_runs(self._memory) if self._runs is None else self._runs
            runs = coarser(own, size_bytes, self._most_runs)
        else:
            runs = held_runs(self._memory)
        crcs = {}
        for chunk, parts in _by_chunk(runs):
            if before_chunk is not None:
                before_chunk()
            crc, at = 0, chunk * CHUNK
            held_before = self._held_bytes
            for offset, length in parts:
                if not is_diff:
                    crc = _crc_of_zeroes(offset - at, crc)
                crc = self._write_part(offset, length, crc)
                at = offset + length
            if self._held_bytes != held_before:
                if not is_diff:
                    crc = _crc_of_zeroes(min((chunk + 1) * CHUNK, size_bytes) - at, crc)
                crcs[chunk] = crc
        return Written(self._held_bytes, crcs, tuple(runs) if is_diff else None)

    def copy(self, runs: Iterable[Run]) -> list[Run]:
        """Write ``runs`` and no CRCs; return the parts of them that are not all zero.  OSError."""
        written = []
        for region, start, size in parts_in_regions(self._memory, runs):
            for begin, end in self._not_zero(region, start, size):
                write_all(self._fd, region.view, begin, end, region.position)
                written.append((region.position + begin, end - begin))
        return written

    def _write_part(self, offset: int, length: int, crc: int) -> int:
        """Write a part of RAM; return the CRC of it behind ``crc``."""
        self._held_bytes += total(self.copy([(offset, length)]))
        for region, start, size in parts_in_regions(self._memory, [(offset, length)]):
            with region.view[start : start + size] as part:
                crc = zlib.crc32(part, crc)
        return crc

    def _not_zero(self, region: Region, start: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield start and end in ``region`` of neighbouring blocks that are not all zero."""
        address, end = region.host_address, start + size
        begin = start
        for at in range(start, end, _BLOCK):
            step = min(_BLOCK, end - at)
            if not self._differ(address + at, _ZEROES, step):
                if begin < at:
                    yield begin, at
                begin = at + step
        if begin < end:
            yield begin, end


def write_all(fd: int, view: memoryview, start: int, end: int, position: int) -> None:
    """Write ``view[start:end]`` to the file, in which ``view`` begins at ``position``; OSError."""
    while start < end:
        with view[start:end] as part:
            start += os.pwrite(fd, part, position + start)
