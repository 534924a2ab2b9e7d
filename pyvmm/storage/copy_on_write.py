"""The half of every overlay: blocks in a store, others below, edges copied when one is written."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from pyvmm.storage.backend import BlockBackend, BufferCursor, check_range
from pyvmm.storage.bitmap import BLOCK_SIZE, BlockBitmap, block_count

_NAME = "overlay"


class CopyOnWrite(abc.ABC):
    """A disk of ``size_bytes`` whose written blocks, those of ``bitmap``, are in a store."""

    read_only = False
    can_write_zeroes = True
    merges = False

    def __init__(self, size_bytes: int, block_size: int, bitmap: BlockBitmap) -> None:
        self.size_bytes = size_bytes
        self.block_size = block_size
        self.extra_calls = 0
        self._bitmap = bitmap

    @abc.abstractmethod
    def _place(self) -> tuple[BlockBackend, int]:
        """Return the store, and where the disk's first byte is in it; OSError if none can be."""

    @abc.abstractmethod
    def _read_below(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Read bytes that the store does not hold."""

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``."""
        length = sum(map(len, buffers))
        check_range(_NAME, offset, length, self.size_bytes)
        cursor = None
        for start, count, is_held in self._bitmap.runs(offset, length):
            if count == length:
                part = buffers
            else:
                cursor = cursor or BufferCursor(buffers)
                part = cursor.take(count)
                self.extra_calls += 1
            if is_held:
                store, data = self._place()
                store.readv(part, data + start)
            else:
                self._read_below(part, start)

    def refresh_size(self) -> int:
        """Return the size that the disk below had when the overlay was made: it keeps it."""
        return self.size_bytes

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockBackend.discard``: holes in the store; the bits stay.

        Blocks that the store holds read as zero from then on, all others as before.
        """
        check_range(_NAME, offset, length, self.size_bytes)
        store, data = self._place()
        store.discard(data + offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``: the blocks are held, as holes with ``unmap``."""
        check_range(_NAME, offset, length, self.size_bytes)
        if not length:
            return
        store, data = self._place()
        head, tail = self._block_edges(offset, length)
        store.write_zeroes(data + offset, length, unmap=unmap)
        if head:
            store.writev([memoryview(head)], data + offset - len(head))
            self.extra_calls += 1
        if tail:
            store.writev([memoryview(tail)], data + offset + length)
            self.extra_calls += 1
        self._bitmap.hold(offset, length)

    def _holds_all(self, offset: int, length: int) -> bool:
        return all(is_held for _, _, is_held in self._bitmap.runs(offset, length))

    def _write_whole_blocks(self, buffers: Sequence[memoryview], offset: int, length: int) -> None:
        """Write ``buffers`` and the rest of their first and last block, and hold these blocks."""
        store, data = self._place()
        head, tail = self._block_edges(offset, length)
        whole = [memoryview(head), *buffers, memoryview(tail)] if head or tail else buffers
        store.writev(whole, data + offset - len(head))
        self._bitmap.hold(offset, length)

    def _block_edges(self, offset: int, length: int) -> tuple[bytearray, bytearray]:
        """Return the bytes of the first block before, and of the last block behind, these bytes.

        At the end of the disk the last block is cut off.
        """
        start = offset // BLOCK_SIZE * BLOCK_SIZE
        end = offset + length
        head = bytearray(offset - start)
        tail = bytearray(min(block_count(end) * BLOCK_SIZE, self.size_bytes) - end)
        if head:
            self.readv([memoryview(head)], start)
            self.extra_calls += 1
        if tail:
            self.readv([memoryview(tail)], end)
            self.extra_calls += 1
        return head, tail
