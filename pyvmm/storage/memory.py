"""A disk in memory."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from pyvmm.storage.backend import SECTOR_SIZE, check_range, read_only_error, write_real_zeroes

_NAME = "memory disk"


class MemoryBackend:
    """A disk whose bytes are ``buffer``, which remains the caller's.

    A buffer of immutable bytes is a read-only disk.  ``refresh_size`` sees a bytearray that has
    grown.  A flush does nothing, because a write is as stable at once as it will ever be.
    """

    block_size = SECTOR_SIZE
    extra_calls = 0
    merges = False

    def __init__(
        self, buffer: bytearray | memoryview | mmap.mmap | bytes, *, read_only: bool = False
    ) -> None:
        # No view is kept: a bytearray with a view on it cannot grow.
        self._buffer = buffer
        with memoryview(buffer) as view:
            self.read_only = read_only or view.readonly
        self.can_discard = self.can_write_zeroes = not self.read_only
        self.size_bytes = self.refresh_size()

    def duplicate_for_reading(self) -> MemoryBackend:
        """Return the same buffer as a read-only disk of its own."""
        disk = MemoryBackend(self._buffer, read_only=True)
        disk.size_bytes = self.size_bytes
        return disk

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``."""
        with self._open(offset, sum(map(len, buffers))) as disk:
            for buffer in buffers:
                buffer[:] = disk[offset : offset + len(buffer)]
                offset += len(buffer)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``."""
        if self.read_only:
            raise read_only_error(_NAME)
        with self._open(offset, sum(map(len, buffers))) as disk:
            for buffer in buffers:
                disk[offset : offset + len(buffer)] = buffer
                offset += len(buffer)

    def flush(self) -> None:
        """Nothing to do."""

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockBackend.discard``; zeroes from now on."""
        self.write_zeroes(offset, length, unmap=True)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``."""
        check_range(_NAME, offset, length, self.size_bytes)
        write_real_zeroes(self, offset, length)

    def refresh_size(self) -> int:
        """See ``BlockBackend.refresh_size``."""
        with memoryview(self._buffer) as view:
            self.size_bytes = view.nbytes - view.nbytes % SECTOR_SIZE
        return self.size_bytes

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``: nothing here waits."""

    def close(self) -> None:
        """Nothing to do: the buffer is the caller's."""

    def _open(self, offset: int, length: int) -> memoryview:
        """Return the buffer as bytes; OutsideError unless ``length`` of them are at ``offset``."""
        view = memoryview(self._buffer).cast("B")
        check_range(_NAME, offset, length, min(self.size_bytes, view.nbytes))
        return view
