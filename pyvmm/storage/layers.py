"""The layers under frozen disks: immutable, shared, a tree over one base.

Every frozen disk is the base and the layers from its newest downward.  A disk that stands at a
layer, or a layer above it, keeps the layer.  Readers find a block's layer in a map of the frozen
disk, so a read costs the same over one layer and over three hundred.

Merging two layers while others read them needs no lock: the merge moves blocks to places that
nobody reads yet, redirects, and counts ``changes``; a reader who finds that the count has changed
reads once more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from pyvmm.errors import HostError
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.storage.backend import BlockBackend, BufferCursor
from pyvmm.storage.bitmap import BLOCK_SIZE, BLOCKS_PER_PAGE, BlockBitmap, bit_runs, block_count
from pyvmm.storage.files import copy_range
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.raw import RawBackend
from pyvmm.storage.scratch import Stripe

if TYPE_CHECKING:
    from array import array

BASE = 0
"""The number of the base in a map of blocks; layers are numbered from 1."""
_MAX_NUMBER = 0xFFFF
_ENOUGH_NUMBERS = 8192
"""Used up by merging, they are given anew: the table of numbers stays short."""
_CHEAP_BLOCKS = 256
"""Two layers are merged at once if one of them has no more blocks: 1 MiB."""
_MAX_LAYERS = 64
"""With more, two are merged whatever it costs."""
_MERGES_AT_ONCE = 4
"""A guest waits meanwhile.  The next snapshot goes on."""

_CHUNK = 64
_ONES, _ZEROES = b"\xff" * _CHUNK, bytes(_CHUNK)

BlockMap = dict[int, "array[int] | None"]
"""By page of the bitmap: the number of the layer that has each block; None if the base has all."""


class Layer:
    """Blocks that hide those of ``below``, or of the base if that is None.

    ``place`` is their store, and the place in it of the disk's first byte; ``stripe`` owns it, or
    None: then the store does.
    """

    def __init__(
        self, place: tuple[RawBackend, int], bitmap: BlockBitmap, stripe: Stripe | None,
        below: Layer | None,
    ) -> None:
        import array  # noqa: F401 - put_layer needs it while the guest runs, which is too late

        self.place = place
        self.bitmap = bitmap
        self.blocks = bitmap.held_blocks()  # if it has a stripe
        self.stripe = stripe
        self.below = below
        self.numbers: list[int] = []  # the first, and those of layers merged into this one
        self.disks = 0  # frozen disks that stand at this layer
        self.above = 0  # layers that stand on this one

    def free(self) -> None:
        """Free the room of the blocks."""
        if self.stripe is None:
            self.place[0].close()
        else:
            self.stripe.free()


class LayerTree:
    """``base`` and all layers over it; owns them.  ``changes`` and ``epoch`` are for readers.

    ``epoch`` changes with the numbers of the layers, which makes every map useless.
    """

    def __init__(self, base: BlockBackend) -> None:
        self.base = base
        self.changes = 0
        self.epoch = 0
        self.layers: dict[int, Layer] = {}
        self.lock = threading.Lock()
        self._disks = 0
        self._next_number = BASE + 1
        self._count = 0
        # Only one thread at a time may call a disk of a kind that is not known here.
        self._base_lock = None
        if not isinstance(base, (RawBackend, MemoryBackend)):
            self._base_lock = threading.Lock()

    def add_disk(self, newest: Layer | None) -> None:
        """Count a frozen disk that stands at ``newest``."""
        with self.lock:
            self._disks += 1
            if newest is not None:
                newest.disks += 1

    def remove_disk(self, newest: Layer | None) -> None:
        """Count one less, and free what nobody needs any more."""
        with self.lock:
            self._disks -= 1
            if newest is not None:
                newest.disks -= 1
            while newest is not None and not newest.disks and not newest.above:
                for number in newest.numbers:
                    del self.layers[number]
                self._count -= 1
                newest.free()
                newest = newest.below
                if newest is not None:
                    newest.above -= 1
            if not self._disks:
                self.base.close()

    @property
    def has_one_disk(self) -> bool:
        """True if no second frozen disk is open."""
        return self._disks == 1

    def add_layer(self, layer: Layer) -> None:
        """Number ``layer``, which stands on ``layer.below``."""
        with self.lock:
            if self._next_number > max(_ENOUGH_NUMBERS, 2 * self._count):
                self._renumber()
            if self._next_number > _MAX_NUMBER:
                raise HostError(f"a disk has at most {_MAX_NUMBER} frozen layers: close snapshots")
            layer.numbers.append(self._next_number)
            self.layers[self._next_number] = layer
            self._next_number += 1
            self._count += 1
            if layer.below is not None:
                layer.below.above += 1

    def _renumber(self) -> None:
        """Number the layers anew, because the numbers of merged ones are used up.

        Both readers that begin before and readers that begin meanwhile have to read once more.
        """
        self.changes += 1
        self.epoch += 1
        layers = list(dict.fromkeys(self.layers.values()))
        self.layers = dict(enumerate(layers, BASE + 1))
        for number, layer in self.layers.items():
            layer.numbers = [number]
        self._next_number = len(layers) + 1
        self.changes += 1

    def read(self, number: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Read bytes that all are in the base or the layer ``number``."""
        if number != BASE:
            store, data = self.layers[number].place
            store.readv(buffers, data + offset)
        elif self._base_lock is None:
            self.base.readv(buffers, offset)
        else:
            with self._base_lock:
                self.base.readv(buffers, offset)

    # Merging ------------------------------------------------------------------------------------

    def merge_below(self, newest: Layer) -> None:
        """Merge layers from ``newest`` downward that nobody needs apart, a few at a time.

        They are those that no disk stands at and on which no second layer stands.  A pair is merged
        if that is cheap, or if there are too many layers.
        """
        with self.lock:
            for _ in range(_MERGES_AT_ONCE):
                pairs = list(_pairs(newest))
                if not pairs:
                    return
                upper, lower = min(pairs, key=lambda pair: min(pair[0].blocks, pair[1].blocks))
                is_cheap = min(upper.blocks, lower.blocks) <= _CHEAP_BLOCKS
                if not is_cheap and self._count <= _MAX_LAYERS:
                    return
                try:
                    self._merge(upper, lower)
                except OSError:
                    return  # no room: they stay apart

    def _merge(self, upper: Layer, lower: Layer) -> None:
        """Make one layer of both, in the place of the one that has more blocks."""
        moves_down = upper.blocks <= lower.blocks
        kept, moved = (lower, upper) if moves_down else (upper, lower)
        (target, to), (source, at) = kept.place, moved.place
        for index, page in moved.bitmap.pages.items():
            bits = int.from_bytes(page, "little")
            if not moves_down:
                bits &= ~int.from_bytes(upper.bitmap.pages.get(index, b""), "little")
            page_at = index * BLOCKS_PER_PAGE * BLOCK_SIZE
            some = bits.to_bytes(len(page), "little")
            for start, count in _held_runs(some):
                offset = page_at + start * BLOCK_SIZE
                copy_range(
                    source.fileno(), at + offset, target.fileno(), to + offset, count * BLOCK_SIZE
                )
        bitmap = BlockBitmap()
        for index in {*upper.bitmap.pages, *lower.bitmap.pages}:
            both = [layer.bitmap.pages.get(index, b"") for layer in (upper, lower)]
            bits = int.from_bytes(both[0], "little") | int.from_bytes(both[1], "little")
            bitmap.pages[index] = bytearray(bits.to_bytes(max(map(len, both)), "little"))
        freed = moved.stripe
        upper.place, upper.stripe, upper.bitmap = kept.place, kept.stripe, bitmap
        upper.blocks = bitmap.held_blocks()
        upper.below = lower.below
        for number in lower.numbers:
            self.layers[number] = upper
        upper.numbers += lower.numbers
        self._count -= 1
        self.changes += 1
        assert freed is not None
        freed.free()


def _pairs(newest: Layer) -> Iterator[tuple[Layer, Layer]]:
    """Yield (upper, lower) from ``newest`` downward, of layers that can be merged."""
    upper = newest
    while upper.below is not None:
        lower = upper.below
        if not lower.disks and lower.above == 1 and upper.stripe and lower.stripe:
            yield upper, lower
        upper = lower


def _held_runs(page: bytes) -> Iterator[tuple[int, int]]:
    """Yield (first block, how many) for each run of set bits."""
    position = 0
    for count, is_held in bit_runs(page, 0, BLOCKS_PER_PAGE):
        if is_held:
            yield position, count
        position += count


# The map of a frozen disk ----------------------------------------------------------------------


def map_page(newest: Layer | None, index: int) -> array[int] | None:
    """Return page ``index`` of the map of the disk at ``newest``."""
    layers = []
    while newest is not None:
        layers.append(newest)
        newest = newest.below
    page: array[int] | None = None
    for layer in reversed(layers):
        page = put_layer(page, layer, index)
    return page


def put_layer(page: array[int] | None, layer: Layer, index: int) -> array[int] | None:
    """Say in page ``index`` of a map that the blocks of ``layer`` are there; return the page."""
    from array import array  # loaded with the first layer: most disks have none

    bits = layer.bitmap.peek(index)
    if bits is None:
        return page
    if page is None:
        page = array("H", bytes(2 * BLOCKS_PER_PAGE))
    # By bytes, not by runs: a guest may have written every second block, and waits meanwhile.
    number = layer.numbers[0]
    chunk_of_ones = array("H", [number]) * (8 * _CHUNK)
    for at in range(0, len(bits), _CHUNK):
        chunk = bits[at : at + _CHUNK]
        if chunk == _ONES:
            page[8 * at : 8 * (at + _CHUNK)] = chunk_of_ones
        elif chunk != _ZEROES:
            for block, byte in enumerate(chunk, at):
                while byte:
                    page[8 * block + byte.bit_length() - 1] = number
                    byte ^= 1 << byte.bit_length() - 1
    return page


def pieces(
    page_of: Callable[[int], array[int] | None], offset: int, length: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the bytes from ``offset`` as (offset, length, number of the layer)."""
    position, end = offset, offset + length
    while position < end:
        block = position // BLOCK_SIZE
        index, first = divmod(block, BLOCKS_PER_PAGE)
        count = min(BLOCKS_PER_PAGE - first, block_count(end) - block)
        page = page_of(index)
        some = None if page is None else page[first : first + count]
        done = 0
        while done < count:
            number, stop = BASE, count
            if some is not None:
                number = some[done]
                if done or some.count(number) != count:
                    stop = done
                    while stop < count and some[stop] == number:
                        stop += 1
            until = min(end, (block + stop) * BLOCK_SIZE)
            yield position, until - position, number
            position, done = until, stop


def read_pieces(
    tree: LayerTree, parts: list[tuple[int, int, int]], buffers: Sequence[memoryview]
) -> None:
    """Read ``parts``, as ``pieces`` yields them, into ``buffers``."""
    if len(parts) == 1:
        tree.read(parts[0][2], buffers, parts[0][0])
        return
    cursor = BufferCursor(buffers)
    for start, count, number in parts:
        tree.read(number, cursor.take(count), start)
