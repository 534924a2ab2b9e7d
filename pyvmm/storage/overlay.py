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
from collections.abc import Callable, Sequence

from pyvmm.errors import ConfigError
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.storage.backend import SECTOR_SIZE, BlockBackend, check_range
from pyvmm.storage.bitmap import BLOCK_SIZE, PAGE_SIZE, BlockBitmap, block_count, page_count
from pyvmm.storage.copy_on_write import CopyOnWrite

if TYPE_CHECKING:
    from pyvmm.storage.frozen import FrozenDisk


_NAME = "overlay"

# char magic[8]; le32 version; le32 block_size; le64 size_bytes; le64 data_offset;
# le64 base_stamp; le32 crc32, of all before it; the rest of the store's first sector is 0.
_HEADER = struct.Struct("<8sIIQQQ")
_MAGIC = b"pyvmmcow"
_VERSION = 1
BITMAP_OFFSET = 4096


def store_bytes(size_bytes: int) -> int:
    """Return the size of the store of a disk of ``size_bytes``; nearly all of it stays a hole."""
    return data_offset(size_bytes) + block_count(size_bytes) * BLOCK_SIZE


def data_offset(size_bytes: int) -> int:
    """Return where the disk's bytes begin in the store of a disk of ``size_bytes``."""
    return BITMAP_OFFSET + page_count(size_bytes) * PAGE_SIZE


def format_store(store: BlockBackend, size_bytes: int, base_stamp: int = 0) -> None:
    """Make ``store``, all zero and of ``store_bytes``, an empty one for a disk of ``size_bytes``.

    ``base_stamp`` is any number that changes when the base does: its mtime in ns.
    """
    fields = _HEADER.pack(
        _MAGIC, _VERSION, BLOCK_SIZE, size_bytes, data_offset(size_bytes), base_stamp
    )
    header = (fields + zlib.crc32(fields).to_bytes(4, "little")).ljust(SECTOR_SIZE, b"\0")
    store.writev([memoryview(header)], 0)


class OverlayBackend(CopyOnWrite):
    """``base`` with what was written over it, which is kept in ``store``; owns both.

    ``name`` is the store's, for messages.  ConfigError, naming it, if it is no store, or one for a
    disk of another size.  ``report`` takes a line if a store that holds blocks was made with
    another ``base_stamp``, and if ``close`` cannot save what was never flushed.

    Bits of blocks written since the last flush are only in memory.  ``flush`` makes the blocks
    stable, writes the bits, and makes these stable.
    """

    def __init__(
        self,
        base: BlockBackend,
        store: BlockBackend,
        *,
        name: str,
        base_stamp: int = 0,
        report: Callable[[str], None],
    ) -> None:
        if check_store(store, base.size_bytes, name) != base_stamp:
            if _holds_any(store, base.size_bytes):
                report(
                    f"{name}: its base was changed or copied after the overlay was made; "
                    "if its contents changed, this disk is damaged"
                )
            else:  # nothing in it depends on what the base was
                format_store(store, base.size_bytes, base_stamp)
        super().__init__(base.size_bytes, base.block_size, BlockBitmap(self._load_page))
        self.can_discard = store.can_discard
        self.base = base
        self._store = store
        self._name = name
        self._report = report
        self._data = data_offset(self.size_bytes)
        # Pages with bits of blocks that were written since the last flush.
        self._dirty = self._bitmap.changed
        # The errno, not the error, whose traceback would keep the caller's buffers.
        self._failed_errno = 0
        self._closed = False

    def _place(self) -> tuple[BlockBackend, int]:
        return self._store, self._data

    def _read_below(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.base.readv(buffers, offset)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``."""
        length = sum(map(len, buffers))
        check_range(_NAME, offset, length, self.size_bytes)
        self._check_latch(durable)
        if self._holds_all(offset, length) and not (durable and self._dirty):
            # In place: the bits are stable already.
            try:
                self._store.writev(buffers, self._data + offset, durable=durable)
            except OSError as error:
                if durable:
                    self._latch(error)
                raise
            return
        self._write_whole_blocks(buffers, offset, length)
        if durable:
            self.flush()

    def flush(self) -> None:
        """See ``BlockBackend.flush``."""
        self._check_latch(True)
        try:
            self._store.flush()
            if self._dirty:
                for page in sorted(self._dirty):
                    place = BITMAP_OFFSET + page * PAGE_SIZE
                    self._store.writev([memoryview(self._bitmap.page(page))], place)
                self._store.flush()
                self._dirty.clear()
        except OSError as error:
            self._latch(error)
            raise

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``."""
        self.base.hurry(until_s)
        self._store.hurry(until_s)

    def freeze(self) -> FrozenDisk:
        """Return a copy of what the store holds, over the same base, for the caller to close.

        The store goes on as the place of this disk's writes: a flush must end there.  It is only
        read.  OSError if there is no room for the copy.
        """
        from pyvmm.storage.frozen import FrozenDisk, duplicate_base
        from pyvmm.storage.saving import copy_blocks
        from pyvmm.storage.scratch import take_stripe

        location = getattr(self.base, "path", self._name)
        below = FrozenDisk.of_base(duplicate_base(self.base), location, read_only=False)
        stripe = None
        try:
            stripe = take_stripe(None, below.stripe_bytes, self._report)
            bitmap = BlockBitmap()
            for start, length, is_held in self._bitmap.runs(0, self.size_bytes):
                if is_held:
                    copy_blocks(
                        self._store, self._data + start, stripe.store, stripe.offset + start, length
                    )
                    bitmap.hold(start, length)
            if not bitmap.pages:
                return below.share()
            taken, stripe = stripe, None
            return below.with_layer(taken, bitmap)
        finally:
            if stripe is not None:
                stripe.free()
            below.close()

    def close(self) -> None:
        """Save the bits of written blocks, and close store and base; idempotent.

        A file that is written without a flush keeps its data unless the power is cut.  So does this
        disk.
        """
        if self._closed:
            return
        self._closed = True
        if self._dirty:
            try:
                self.flush()
            except OSError as error:
                self._report(f"{self._name}: what was not flushed is lost: {error}")
        try:
            self._store.close()
        finally:
            self.base.close()

    def _load_page(self, index: int) -> bytearray:
        page = bytearray(PAGE_SIZE)
        self._store.readv([memoryview(page)], BITMAP_OFFSET + index * PAGE_SIZE)
        return page

    def _check_latch(self, durable: bool) -> None:
        if durable and self._failed_errno:
            raise OSError(self._failed_errno, "an earlier flush failed", self._name)

    def _latch(self, error: OSError) -> None:
        self._failed_errno = error.errno or errno.EIO


def _holds_any(store: BlockBackend, size_bytes: int) -> bool:
    """True if ``store`` holds any block of a disk of ``size_bytes``."""
    page = bytearray(PAGE_SIZE)
    for offset in range(BITMAP_OFFSET, data_offset(size_bytes), PAGE_SIZE):
        store.readv([memoryview(page)], offset)
        if any(page):
            return True
    return False


def check_store(store: BlockBackend, size_bytes: int, name: str) -> int:
    """Return the stamp of the base; ConfigError unless ``store`` fits a disk of ``size_bytes``."""
    sector = bytearray(SECTOR_SIZE)
    try:
        store.readv([memoryview(sector)], 0)
    except OSError as error:
        raise ConfigError(name, f"cannot be read: {error.strerror}") from error
    magic, version, block_size, disk_bytes, data_at, stamp = _HEADER.unpack_from(sector)
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
    if (block_size, data_at) != (BLOCK_SIZE, data_offset(size_bytes)):
        raise ConfigError(name, "has a damaged header (it does not fit its own size)")
    if store.size_bytes < store_bytes(size_bytes):
        raise ConfigError(
            name, f"is cut off: it has {store.size_bytes} bytes of {store_bytes(size_bytes)}"
        )
    return int(stamp)
