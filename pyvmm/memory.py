"""Guest RAM: one host mapping, reached only through bounds-checked guest physical addresses.

Python slices silently shorten and ``struct.pack_into`` accepts negative offsets, so every access
checks start, length, sign and wrap here (compare vm-memory's ``bytes.rs``) and raises
``GuestMemoryError(gpa, length)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from pyvmm.errors import GuestMemoryError, HostError

PAGE_SIZE = 4096
_MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE came with Python 3.13


@dataclass(frozen=True, slots=True)
class Region:
    """``length`` bytes of RAM at guest physical ``gpa``, backed by ``offset`` in the mapping."""

    gpa: int
    length: int
    offset: int

    @property
    def end(self) -> int:
        """The first guest physical address after the region."""
        return self.gpa + self.length


class GuestMemory:
    """The only holder of guest RAM.

    ``ranges`` are ``(gpa, length)`` pairs in bytes, ascending and disjoint.  The mapping is
    private anonymous memory with huge pages (0.2 us a page); with ``shared=True`` it is a memfd
    (5 us a page), needed only where another process must see it; ``fd`` is then its descriptor.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], *, shared: bool = False) -> None:
        total = sum(length for _, length in ranges)
        self.fd: int | None = None
        self._map: mmap.mmap | None = None
        try:
            if shared:
                self.fd = os.memfd_create("pyvmm-ram", os.MFD_CLOEXEC)
                os.ftruncate(self.fd, total)
                self._map = mmap.mmap(self.fd, total)
            else:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
                self._map = mmap.mmap(-1, total, flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            if self.fd is not None:
                os.close(self.fd)
            raise HostError(f"cannot map {total >> 20} MiB of guest RAM: {error}") from error
        if not shared:
            # Fewer faults and TLB misses; a kernel without THP refuses, which costs only speed.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._setup(memoryview(self._map), ranges)

    @classmethod
    def over(cls, buffer: bytearray | mmap.mmap, gpa: int = 0) -> GuestMemory:
        """RAM over a buffer the caller owns, at ``gpa``: what a test of a device needs."""
        memory = cls.__new__(cls)
        memory.fd = None
        memory._map = None
        memory._setup(memoryview(buffer), [(gpa, len(buffer))])
        return memory

    def _setup(self, root: memoryview, ranges: Sequence[tuple[int, int]]) -> None:
        self._root = root
        regions = []
        offset = 0
        for gpa, length in ranges:
            regions.append(Region(gpa, length, offset))
            offset += length
        self.regions = tuple(regions)
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """All RAM, in bytes."""
        return sum(region.length for region in self.regions)

    @property
    def host_address(self) -> int:
        """Host virtual address of the mapping's first byte, for KVM_SET_USER_MEMORY_REGION."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._root))

    def contains(self, gpa: int, length: int) -> bool:
        """Whether all ``length`` bytes at ``gpa`` lie in one region of RAM."""
        if length < 0:
            return False
        return any(r.gpa <= gpa and gpa + length <= r.end for r in self.regions)

    def offset_of(self, gpa: int, length: int) -> int:
        """Offset in the mapping of ``length`` bytes at ``gpa``; GuestMemoryError if not RAM."""
        if length >= 0:
            for region in self.regions:
                if region.gpa <= gpa and gpa + length <= region.gpa + region.length:
                    return gpa - region.gpa + region.offset
        raise GuestMemoryError(gpa, length)

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view of exactly ``length`` bytes of RAM at ``gpa``."""
        offset = self.offset_of(gpa, length)
        return self._root[offset : offset + length]

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of ``length`` bytes at ``gpa``."""
        offset = self.offset_of(gpa, length)
        return bytes(self._root[offset : offset + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``."""
        length = len(data)
        offset = self.offset_of(gpa, length)
        self._root[offset : offset + length] = data

    def read_int(self, gpa: int, size: int) -> int:
        """The little-endian unsigned integer of ``size`` bytes at ``gpa``."""
        return int.from_bytes(self.read(gpa, size), "little")

    def write_int(self, gpa: int, size: int, value: int) -> None:
        """Store ``value`` as ``size`` little-endian bytes; OverflowError if it does not fit."""
        self.write(gpa, value.to_bytes(size, "little"))

    def close(self) -> None:
        """Unmap the RAM; idempotent.  The caller has dropped every view taken from it."""
        if self._closed:
            return
        self._closed = True
        self._root.release()
        if self._map is not None:
            self._map.close()
        if self.fd is not None:
            os.close(self.fd)

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
