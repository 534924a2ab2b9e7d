"""A writable disk over one that is never written: copy on write.

The *store* holds written blocks of 4 KiB, each at a fixed place, and a bitmap of the blocks that it
holds.  All other blocks are read from the *base*.  docs/disks.md has the file format and shows that
it survives a power cut.  In short, a block's bit reaches the store only after the block is stable
there, and no bit depends on another.
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence

from pyvmm.errors import ConfigError
from pyvmm.storage.backend import (
    SECTOR_SIZE,
    BlockBackend,
    BufferCursor,
    check_range,
)

BLOCK_SIZE = 4096
"""Bytes of a block, which is copied when a part of it is written."""
_PAGE_SIZE = 4096  # of the bitmap
_BLOCKS_PER_PAGE = _PAGE_SIZE * 8
_NAME = "overlay"

# char magic[8]; le32 version; le32 block_size; le64 size_bytes; le64 data_offset;
# le64 base_stamp; le32 crc32, of all before it; the rest of the store's first sector is 0.
_HEADER = struct.Struct("<8sIIQQQ")
_MAGIC = b"pyvmmcow"
_VERSION = 1
BITMAP_OFFSET = 4096


def store_bytes(size_bytes: int) -> int:
    """Return the size of the store of a disk of ``size_bytes``; nearly all of it stays a hole."""
    return _data_offset(size_bytes) + _blocks(size_bytes) * BLOCK_SIZE


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_SIZE)


def _data_offset(size_bytes: int) -> int:
    pages = -(-_blocks(size_bytes) // _BLOCKS_PER_PAGE)
    return BITMAP_OFFSET + pages * _PAGE_SIZE


def format_store(store: BlockBackend, size_bytes: int, base_stamp: int = 0) -> None:
    """Make ``store``, all zero and of ``store_bytes``, an empty one for a disk of ``size_bytes``.

    ``base_stamp`` is any number that changes when the base does: its mtime in ns.
    """
    fields = _HEADER.pack(
        _MAGIC, _VERSION, BLOCK_SIZE, size_bytes, _data_offset(size_bytes), base_stamp
    )
    header = (fields + zlib.crc32(fields).to_bytes(4, "little")).ljust(SECTOR_SIZE, b"\0")
    store.writev([memoryview(header)], 0)


class OverlayBackend:
    """``base`` with what was written over it, which is kept in ``store``; owns both.

    ``name`` is the store's, for messages.  ConfigError, naming it, if it is no store, or one for a
    disk of another size.  With ``keep`` False the store will not be opened again, so flushes do
    nothing.  ``report`` takes a line if a store that holds blocks was made with another
    ``base_stamp``, and if ``close`` cannot save what was never flushed.

    Bits of blocks written since the last flush are only in memory.  ``flush`` makes the blocks
    stable, writes the bits, and makes these stable.
    """

    read_only = False
    can_write_zeroes = True

    def __init__(
        self,
        base: BlockBackend,
        store: BlockBackend,
        *,
        name: str,
        base_stamp: int = 0,
        keep: bool = True,
        report: Callable[[str], None],
    ) -> None:
        if _check_store(store, base.size_bytes, name) != base_stamp:
            if _holds_any(store, base.size_bytes):
                report(
                    f"{name}: its base was changed or copied after the overlay was made; "
                    "if its contents changed, this disk is damaged"
                )
            else:  # nothing in it depends on what the base was
                format_store(store, base.size_bytes, base_stamp)
        self.size_bytes = base.size_bytes
        self.block_size = base.block_size
        self.can_discard = store.can_discard
        self._base = base
        self._store = store
        self._name = name
        self._keep = keep
        self._report = report
        self._data = _data_offset(self.size_bytes)
        self._pages: dict[int, bytearray] = {}
        self._dirty: set[int] = set()
        self.extra_calls = 0
        self.merges = False
        # The errno, not the error, whose traceback would keep the caller's buffers.
        self._failed_errno = 0
        self._closed = False

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``."""
        length = sum(map(len, buffers))
        check_range(_NAME, offset, length, self.size_bytes)
        cursor = BufferCursor(buffers)
        for start, count, is_held in self._runs(offset, length):
            if count == length:
                part = buffers
            else:
                part = cursor.take(count)
                self.extra_calls += 1
            if is_held:
                self._store.readv(part, self._data + start)
            else:
                self._base.readv(part, start)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``."""
        length = sum(map(len, buffers))
        check_range(_NAME, offset, length, self.size_bytes)
        self._check_latch(durable)
        is_sync = durable and self._keep
        is_held = all(held for _, _, held in self._runs(offset, length))
        if is_held and not (is_sync and self._dirty):
            # In place: the bits are stable already.
            try:
                self._store.writev(buffers, self._data + offset, durable=is_sync)
            except OSError as error:
                if is_sync:
                    self._latch(error)
                raise
            return
        head, tail = self._block_edges(offset, length)
        whole = [memoryview(head), *buffers, memoryview(tail)]
        self._store.writev(whole, self._data + offset - len(head))
        self._hold(offset, length)
        if is_sync:
            self.flush()

    def flush(self) -> None:
        """See ``BlockBackend.flush``."""
        self._check_latch(True)
        if not self._keep:
            return
        try:
            self._store.flush()
            if self._dirty:
                for page in sorted(self._dirty):
                    place = BITMAP_OFFSET + page * _PAGE_SIZE
                    self._store.writev([memoryview(self._pages[page])], place)
                self._store.flush()
                self._dirty.clear()
        except OSError as error:
            self._latch(error)
            raise

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockBackend.discard``: holes in the store; the bits stay.

        Blocks that the store holds read as zero from then on, all others as before.
        """
        check_range(_NAME, offset, length, self.size_bytes)
        self._store.discard(self._data + offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``: the blocks are held, as holes with ``unmap``."""
        check_range(_NAME, offset, length, self.size_bytes)
        if not length:
            return
        head, tail = self._block_edges(offset, length)
        self._store.write_zeroes(self._data + offset, length, unmap=unmap)
        if head:
            self._store.writev([memoryview(head)], self._data + offset - len(head))
            self.extra_calls += 1
        if tail:
            self._store.writev([memoryview(tail)], self._data + offset + length)
            self.extra_calls += 1
        self._hold(offset, length)

    def refresh_size(self) -> int:
        """Return the size that the base had when the overlay was made: an overlay keeps it."""
        return self.size_bytes

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``."""
        self._base.hurry(until_s)
        self._store.hurry(until_s)

    def close(self) -> None:
        """Save the bits of written blocks, and close store and base; idempotent.

        A file that is written without a flush keeps its data unless the power is cut.  So does this
        disk.
        """
        if self._closed:
            return
        self._closed = True
        if self._dirty and self._keep:
            try:
                self.flush()
            except OSError as error:
                self._report(f"{self._name}: what was not flushed is lost: {error}")
        try:
            self._store.close()
        finally:
            self._base.close()

    # Which blocks are held ---------------------------------------------------------------------

    def _page(self, index: int) -> bytearray:
        """Page ``index`` of the bitmap, read when it is first needed.

        Bit n % 8 of byte n // 8 (of the whole bitmap) belongs to block n.
        """
        page = self._pages.get(index)
        if page is None:
            page = bytearray(_PAGE_SIZE)
            self._store.readv([memoryview(page)], BITMAP_OFFSET + index * _PAGE_SIZE)
            self._pages[index] = page
        return page

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the bytes from ``offset`` as (offset, length, True if the store holds them)."""
        position, end = offset, offset + length
        while position < end:
            block = position // BLOCK_SIZE
            page, first = divmod(block, _BLOCKS_PER_PAGE)
            last = min(_BLOCKS_PER_PAGE, first + _blocks(end) - block)
            some = self._page(page)[first // 8 : -(-last // 8)]
            bits = int.from_bytes(some, "little") >> first % 8
            left = last - first
            bits &= (1 << left) - 1
            while left:
                is_held = bool(bits & 1)
                # The lowest bit that differs from the run, or everything that is left.
                other = bits ^ ((1 << left) - 1) if is_held else bits
                count = (other & -other).bit_length() - 1 if other else left
                stop = min(end, (position // BLOCK_SIZE + count) * BLOCK_SIZE)
                yield position, stop - position, is_held
                position = stop
                bits >>= count
                left -= count

    def _hold(self, offset: int, length: int) -> None:
        """Mark the blocks of these bytes as held by the store."""
        block, end = offset // BLOCK_SIZE, _blocks(offset + length)
        while block < end:
            index, first = divmod(block, _BLOCKS_PER_PAGE)
            last = min(_BLOCKS_PER_PAGE, first + end - block)
            page = self._page(index)
            low, high = first // 8, -(-last // 8)
            old = int.from_bytes(page[low:high], "little")
            new = old | ((1 << (last - first)) - 1) << first % 8
            if new != old:
                page[low:high] = new.to_bytes(high - low, "little")
                self._dirty.add(index)
            block += last - first

    def _block_edges(self, offset: int, length: int) -> tuple[bytearray, bytearray]:
        """Return the bytes of the first block before, and of the last block behind, these bytes.

        At the end of the disk the last block is cut off.
        """
        start = offset // BLOCK_SIZE * BLOCK_SIZE
        end = offset + length
        head = bytearray(offset - start)
        tail = bytearray(min(_blocks(end) * BLOCK_SIZE, self.size_bytes) - end)
        self.readv([memoryview(head)], start)
        self.readv([memoryview(tail)], end)
        self.extra_calls += bool(head) + bool(tail)
        return head, tail

    def _check_latch(self, durable: bool) -> None:
        if durable and self._failed_errno:
            raise OSError(self._failed_errno, "an earlier flush failed", self._name)

    def _latch(self, error: OSError) -> None:
        self._failed_errno = error.errno or errno.EIO


def _holds_any(store: BlockBackend, size_bytes: int) -> bool:
    """True if ``store`` holds any block of a disk of ``size_bytes``."""
    page = bytearray(_PAGE_SIZE)
    for offset in range(BITMAP_OFFSET, _data_offset(size_bytes), _PAGE_SIZE):
        store.readv([memoryview(page)], offset)
        if any(page):
            return True
    return False


def _check_store(store: BlockBackend, size_bytes: int, name: str) -> int:
    """Return the stamp of the base; ConfigError unless ``store`` fits a disk of ``size_bytes``."""
    sector = bytearray(SECTOR_SIZE)
    try:
        store.readv([memoryview(sector)], 0)
    except OSError as error:
        raise ConfigError(name, f"cannot be read: {error.strerror}") from error
    magic, version, block_size, disk_bytes, data_offset, stamp = _HEADER.unpack_from(sector)
    if magic != _MAGIC:
        from pyvmm.storage.image_kinds import kind_of_head

        kind = kind_of_head(bytes(sector))
        what = "is no overlay" if kind is None else f"is {kind.name}, no overlay"
        raise ConfigError(name, f"{what} of pyvmm's; name a file that does not exist yet")
    fields = sector[: _HEADER.size]
    checksum = int.from_bytes(sector[_HEADER.size : _HEADER.size + 4], "little")
    if checksum != zlib.crc32(fields):
        raise ConfigError(name, "has a damaged header (its checksum is wrong)")
    if version != _VERSION:
        raise ConfigError(name, f"is an overlay of version {version}; this pyvmm knows {_VERSION}")
    if disk_bytes != size_bytes:
        raise ConfigError(
            name, f"belongs to a base of {disk_bytes} bytes, and this one has {size_bytes}"
        )
    if (block_size, data_offset) != (BLOCK_SIZE, _data_offset(size_bytes)):
        raise ConfigError(name, "has a damaged header (it does not fit its own size)")
    if store.size_bytes < store_bytes(size_bytes):
        raise ConfigError(
            name, f"is cut off: it has {store.size_bytes} bytes of {store_bytes(size_bytes)}"
        )
    return int(stamp)
