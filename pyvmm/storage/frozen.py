"""Immutable disks, from which any number of private ones are opened."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from pyvmm.startup.types import TYPE_CHECKING, Record
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.bitmap import BLOCK_SIZE, BlockBitmap, block_count
from pyvmm.storage.layers import (
    BlockMap,
    Layer,
    LayerTree,
    map_page,
    pieces,
    put_layer,
    read_pieces,
)
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.raw import RawBackend
from pyvmm.storage.scratch import Stripe

if TYPE_CHECKING:
    from array import array

    from pyvmm.storage.faulty import FaultState


_MAX_MAP_PAGES = 256
"""Pages of the map that are kept, of 64 KiB each: those of 32 GiB of the disk."""


class DiskFacts(Record):
    """``location`` is the base: a file's absolute path, else a description.

    ``stamp_ns`` is the base file's mtime when it was opened, 0 if it has none.
    """

    location: str
    size_bytes: int
    block_size: int
    read_only: bool
    stamp_ns: int


class FrozenDisk:
    """The disk at ``newest``, a layer of ``tree``, or its base if that is None; nothing writes it.

    Any number of threads may use it.  Each ``share`` needs a ``close`` of its own, the first owner
    too.  ``faults`` is the state of the faults in front of the disk, if there are any.
    """

    def __init__(
        self, facts: DiskFacts, tree: LayerTree, newest: Layer | None = None, *,
        faults: FaultState | None = None, blocks: tuple[BlockMap, int] | None = None,
    ) -> None:
        self.facts = facts
        self.location = facts.location
        self.size_bytes = facts.size_bytes
        self.block_size = facts.block_size
        self.read_only = facts.read_only
        self.stamp_ns = facts.stamp_ns
        self.faults = faults
        self.tree = tree
        self.newest = newest
        tree.add_disk(newest)
        # Made as far as it is needed; useless once the tree's epoch is another.
        self._blocks, self._epoch = blocks or ({}, tree.epoch)
        self._lock = threading.Lock()
        self._shares = 1

    @classmethod
    def of_base(cls, base: BlockBackend, location: str, *, read_only: bool) -> FrozenDisk:
        """Return ``base``, which nobody writes, as a frozen disk that owns it."""
        stamp_ns = 0
        if isinstance(base, RawBackend):
            stamp_ns = os.fstat(base.fileno()).st_mtime_ns
            location = base.absolute_path
        facts = DiskFacts(
            location=location, size_bytes=base.size_bytes, block_size=base.block_size,
            read_only=read_only, stamp_ns=stamp_ns,
        )
        return cls(facts, LayerTree(base))

    @classmethod
    def open_saved(
        cls, location: str, overlay_path: str | None, *, size_bytes: int, stamp_ns: int,
        read_only: bool, replaced: bool = False, report: Callable[[str], None],
    ) -> FrozenDisk:
        """Return the disk that ``save_overlay`` wrote to ``overlay_path``, or nothing if None.

        Its base is the file ``location``, which must have ``size_bytes`` and, unless ``replaced``,
        the mtime ``stamp_ns``.  SnapshotError.
        """
        from pyvmm.storage.saved import open_base, open_saved_layer

        base = open_base(
            location, size_bytes=size_bytes, stamp_ns=stamp_ns, replaced=replaced, report=report
        )
        disk = cls.of_base(base, location, read_only=read_only)
        if overlay_path is None:
            return disk
        try:
            return disk.with_saved_layer(*open_saved_layer(overlay_path, size_bytes, report))
        finally:
            disk.close()

    @property
    def base(self) -> BlockBackend:
        """The disk below all layers, which stays this one's; its kind says what can be done."""
        return self.tree.base

    @property
    def stripe_bytes(self) -> int:
        """Bytes of a stripe for a layer over this disk."""
        return block_count(self.size_bytes) * BLOCK_SIZE

    @property
    def held_bytes(self) -> int:
        """Bytes of blocks that are in a layer: what ``save_overlay`` writes."""
        found = pieces(self.page_of_map, 0, self.size_bytes)
        return sum(count for _, count, number in found if number)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the newest layer: what it takes to keep this disk beside the one below."""
        return 0 if self.newest is None else self.newest.blocks * BLOCK_SIZE

    def share(self) -> FrozenDisk:
        """Return this disk, with one more owner."""
        with self._lock:
            assert self._shares, "a closed disk has no shares"
            self._shares += 1
        return self

    def close(self) -> None:
        """Give up one share; the last frees what no other disk needs."""
        with self._lock:
            self._shares -= 1
            is_last = not self._shares
        if is_last:
            self.tree.remove_disk(self.newest)
            self._blocks = {}

    def open(self, *, report: Callable[[str], None]) -> BlockBackend:
        """Return a private disk over this one, for the caller to close.

        It keeps a share.  Its faults, if any, go on counting from where they were.
        """
        from pyvmm.storage.private import PrivateDisk

        disk = PrivateDisk(self.share(), report=report)
        if self.faults is None:
            return disk
        from pyvmm.storage.faulty import FaultyBackend

        return FaultyBackend.of_state(disk, self.faults)

    def as_source(self) -> FrozenSource:
        """Return what a ``DiskConfig`` opens private disks from; it has no share."""
        return FrozenSource(self)

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill ``buffers``, in order, from ``offset``; return the calls beyond the first one.

        OSError.  The caller keeps to the disk's size.
        """
        if self.newest is None:
            self.tree.read(0, buffers, offset)
            return 0
        tree, length = self.tree, sum(map(len, buffers))
        while True:
            changes = tree.changes
            try:
                parts = list(pieces(self.page_of_map, offset, length))
                read_pieces(tree, parts, buffers)
            except (OSError, KeyError):
                if tree.changes == changes:
                    raise
            # A layer may have moved under the read.
            if tree.changes == changes:
                return len(parts) - 1

    def page_of_map(self, index: int) -> array[int] | None:
        """Return page ``index`` of the map of the blocks, made when it is first needed."""
        if self._epoch == self.tree.epoch:
            blocks = self._blocks
            if index in blocks:
                return blocks[index]
        with self.tree.lock:
            if self._epoch != self.tree.epoch:
                self._blocks, self._epoch = {}, self.tree.epoch
            if len(self._blocks) >= _MAX_MAP_PAGES:
                del self._blocks[next(iter(self._blocks))]
            page = self._blocks[index] = map_page(self.newest, index)
            return page

    def save_overlay(self, path: str) -> int | None:
        """Write all layers to the new overlay file ``path`` over the base; return the bytes held.

        None, and no file, if they hold nothing.  The file is stable when this returns, but for its
        name.  OSError, and no file.
        """
        from pyvmm.storage.saving import copy_blocks, write_overlay

        def copy(store: RawBackend, at: int, offset: int, length: int) -> None:
            tree = self.tree
            for start, count, number in list(pieces(self.page_of_map, offset, length)):
                source, data = tree.layers[number].place
                copy_blocks(source, data + start, store, at + start - offset, count)

        runs = [
            (start, count)
            for start, count, number in pieces(self.page_of_map, 0, self.size_bytes) if number
        ]
        if not runs:
            return None

        def copy_unmoved(store: RawBackend, at: int, offset: int, length: int) -> None:
            """Copy once more if a layer has moved meanwhile."""
            while True:
                changes = self.tree.changes
                try:
                    copy(store, at, offset, length)
                except (OSError, KeyError):
                    if self.tree.changes == changes:
                        raise
                if self.tree.changes == changes:
                    return
                store.discard(at, length)  # where holes are, nothing is copied

        return write_overlay(path, self.size_bytes, self.stamp_ns, runs, copy_unmoved)

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``: for the base, unless others use it too."""
        if self._shares == 1 and self.tree.has_one_disk:
            self.tree.base.hurry(until_s)

    # Disks derived from this one ------------------------------------------------------------------

    def with_layer(self, stripe: Stripe, bitmap: BlockBitmap) -> FrozenDisk:
        """Return this disk under a new layer, which takes over ``stripe`` and ``bitmap``."""
        layer = Layer((stripe.store, stripe.offset), bitmap, stripe, self.newest)
        self.tree.add_layer(layer)
        # The map moves on to the disk that is used from now on, or each of a hundred checkpoints
        # would keep one.  Readers of this disk keep the pages that they have.
        blocks: BlockMap = {}
        with self.tree.lock:
            epoch = self.tree.epoch
            if self._epoch == epoch:
                for index, page in self._blocks.items():
                    own = None if page is None else page[:]
                    blocks[index] = put_layer(own, layer, index)
            self._blocks = {}
        return FrozenDisk(self.facts, self.tree, layer, blocks=(blocks, epoch))

    def with_saved_layer(
        self, store: RawBackend, data: int, bitmap: BlockBitmap
    ) -> FrozenDisk:
        """Return this disk under the blocks that ``store`` has at ``data``; takes over ``store``.
        """
        layer = Layer((store, data), bitmap, None, self.newest)
        self.tree.add_layer(layer)
        return FrozenDisk(self.facts, self.tree, layer)

    def with_faults(self, faults: FaultState | None) -> FrozenDisk:
        """Return the same disk behind ``faults``, for the caller to close."""
        return FrozenDisk(self.facts, self.tree, self.newest, faults=faults)

    def merge_layers(self) -> None:
        """Merge layers that no disk needs apart, within bounds."""
        if self.newest is not None:
            self.tree.merge_below(self.newest)


def duplicate_base(base: BlockBackend) -> BlockBackend:
    """Return a second disk of the bytes of ``base``, read-only; TypeError if its kind has none."""
    if isinstance(base, (RawBackend, MemoryBackend)):
        return base.duplicate_for_reading()
    raise TypeError(f"{type(base).__name__} cannot be read twice")


class FrozenSource:
    """``disk`` as a ``config.Source``, of a ``DiskConfig``; keep it open until that is opened."""

    snapshot = True
    overlay = ""
    is_shared = True

    def __init__(self, disk: FrozenDisk) -> None:
        self._disk = disk
        self.location = disk.location
        self.read_only = disk.read_only
        self.files: tuple[str, ...] = ()

    def open(
        self, *, report: Callable[[str], None], until_s: float | None = None,
        made: ExitStack | None = None,
    ) -> BlockBackend:
        """See ``config.Source.open``."""
        return self._disk.open(report=report)
