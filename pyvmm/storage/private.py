"""A disk of one machine over a frozen one: its writes are in a file without a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.storage.backend import BlockBackend, check_range, read_only_error
from pyvmm.storage.bitmap import BlockBitmap
from pyvmm.storage.copy_on_write import CopyOnWrite
from pyvmm.storage.scratch import ScratchFile, Stripe, take_stripe

if TYPE_CHECKING:
    from pyvmm.storage.frozen import FrozenDisk


class PrivateDisk(CopyOnWrite):
    """``frozen`` with what was written over it; owns this share of ``frozen``.

    No run will ever read the writes again, so a flush does nothing.  The file for them is made by
    the first write, or by ``make_room``.  ``report`` takes a line for each kind of error that the
    host answers, and one if the file cannot be made.
    """

    def __init__(self, frozen: FrozenDisk, *, report: Callable[[str], None]) -> None:
        super().__init__(frozen.size_bytes, frozen.block_size, BlockBitmap())
        self.read_only = frozen.read_only
        self.can_discard = self.can_write_zeroes = not frozen.read_only
        self._frozen = frozen
        self._report = report
        self._has_complained = False
        self._file: ScratchFile | None = None  # of the newest stripe
        self._top: Stripe | None = None
        self._closed = False

    @property
    def frozen(self) -> FrozenDisk:
        """The disk below, which stays this one's."""
        return self._frozen

    def make_room(self) -> None:
        """Make the file for writes now; OSError if it cannot be made."""
        if self._top is None and not self.read_only:
            self._top = take_stripe(self._file, self._frozen.stripe_bytes, self._report)
            self._file = self._top.file

    def _place(self) -> tuple[BlockBackend, int]:
        if self._top is None:
            try:
                self.make_room()
            except OSError as error:
                if not self._has_complained:
                    self._has_complained = True
                    self._report(
                        f"{self._frozen.location}: no file can be made for what the guest writes: "
                        f"{error.strerror} (TMPDIR names a directory for it; said once)"
                    )
                raise
        assert self._top is not None
        return self._top.store, self._top.offset

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``."""
        if self._bitmap.pages:
            super().readv(buffers, offset)
        else:
            check_range(self._frozen.location, offset, sum(map(len, buffers)), self.size_bytes)
            self._read_below(buffers, offset)

    def _read_below(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.extra_calls += self._frozen.readv(buffers, offset)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``."""
        if self.read_only:
            raise read_only_error(self._frozen.location)
        length = sum(map(len, buffers))
        check_range(self._frozen.location, offset, length, self.size_bytes)
        if not length:
            return
        if self._bitmap.pages and self._holds_all(offset, length):
            store, data = self._place()
            store.writev(buffers, data + offset)
        else:
            self._write_whole_blocks(buffers, offset, length)

    def flush(self) -> None:
        """Nothing to do: nobody reads the file after this process."""

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockBackend.discard``: room of our own is freed, nothing else changes."""
        if self.read_only:
            raise read_only_error(self._frozen.location)
        check_range(self._frozen.location, offset, length, self.size_bytes)
        if self._bitmap.pages:
            super().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``: holes, because the file is nobody's to fill."""
        if self.read_only:
            raise read_only_error(self._frozen.location)
        super().write_zeroes(offset, length, unmap=True)

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``."""
        self._frozen.hurry(until_s)

    def freeze(self) -> FrozenDisk:
        """Return the disk as it is now, which never changes; the caller closes it.

        Writes go to a new layer from now on.  Nobody else may use this disk meanwhile.
        """
        if self._bitmap.pages:
            assert self._top is not None
            below, self._frozen = self._frozen, self._frozen.with_layer(self._top, self._bitmap)
            self._top, self._bitmap = None, BlockBitmap()
            below.close()
            self._frozen.merge_layers()
        return self._frozen.share()

    def revert(self, frozen: FrozenDisk) -> None:
        """Become ``frozen`` again, of which this disk takes a share: forget what was written.

        Nobody else may use this disk meanwhile.
        """
        self._forget_writes()
        if frozen is not self._frozen:
            old, self._frozen = self._frozen, frozen.share()
            old.close()

    def _forget_writes(self) -> None:
        """Empty the top layer; its stripe is used again."""
        if self._bitmap.pages:
            self._bitmap = BlockBitmap()
            if self._top is not None:
                self._top.empty()

    def close(self) -> None:
        """Close the disk, and forget what was written; idempotent."""
        if not self._closed:
            self._closed = True
            if self._top is not None:
                self._top.free()
            self._frozen.close()
