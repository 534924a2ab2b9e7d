"""A writable disk over one that is never written: copy on write.

The *store* holds written blocks of 4 KiB, each at a fixed place, and a bitmap of the blocks that it
holds.  All other blocks are read from the *base*.  docs/disks.md has the file format and shows that
it survives a power cut.  In short, a block's bit reaches the store only after the block is stable
there, and no bit depends on another.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator, Sequence

from pyvmm.storage.backend import BlockBackend, check_range
from pyvmm.storage.bitmap import PAGE_SIZE, BlockBitmap
from pyvmm.storage.copy_on_write import CopyOnWrite
from pyvmm.storage.overlay_format import (
    BITMAP_OFFSET,
    check_store,
    data_offset,
    format_store,
    holds_any,
    load_page,
)

_NAME = "overlay"


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
            if holds_any(store, base.size_bytes):
                report(
                    f"{name}: its base was changed or copied after the overlay was made; "
                    "if its contents changed, this disk is damaged"
                )
            else:  # nothing in it depends on what the base was
                format_store(store, base.size_bytes, base_stamp)
        bitmap = BlockBitmap(functools.partial(load_page, store))
        super().__init__(base.size_bytes, base.block_size, bitmap)
        self.can_discard = store.can_discard
        self.base = base
        self._store = store
        self._name = name
        self.report = report
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

    @property
    def place(self) -> tuple[BlockBackend, int]:
        """The store, which stays this disk's, and where the disk's first byte is in it."""
        return self._place()

    def held_runs(self) -> Iterator[tuple[int, int]]:
        """Yield the bytes that the store holds as (offset, length); OSError."""
        for start, length, is_held in self._bitmap.runs(0, self.size_bytes):
            if is_held:
                yield start, length

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``."""
        self.base.hurry(until_s)
        self._store.hurry(until_s)

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
                self.report(f"{self._name}: what was not flushed is lost: {error}")
        try:
            self._store.close()
        finally:
            self.base.close()

    def _check_latch(self, durable: bool) -> None:
        if durable and self._failed_errno:
            raise OSError(self._failed_errno, "an earlier flush failed", self._name)

    def _latch(self, error: OSError) -> None:
        self._failed_errno = error.errno or errno.EIO
