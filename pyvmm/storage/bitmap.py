"""The blocks that a store holds: one bit for each block of 4 KiB of the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

BLOCK_SIZE = 4096
"""Bytes of a block, which is copied when a part of it is written."""
PAGE_SIZE = 4096
"""Bytes of a page of the bitmap."""
BLOCKS_PER_PAGE = PAGE_SIZE * 8
_BITS_AT_ONCE = 1024


def block_count(size_bytes: int) -> int:
    """Return the blocks of ``size_bytes``; the last may be cut off."""
    return -(-size_bytes // BLOCK_SIZE)


def page_count(size_bytes: int) -> int:
    """Return the pages of the bitmap of a disk of ``size_bytes``."""
    return -(-block_count(size_bytes) // BLOCKS_PER_PAGE)


class BlockBitmap:
    """Bits in pages: bit n % 8 of byte n // 8 belongs to block n.

    A page that is not in ``pages`` comes from ``load``, when it is first needed; without ``load``
    it holds nothing.  ``changed`` gets the index of each page in which a bit is set.
    """

    def __init__(self, load: Callable[[int], bytearray] | None = None) -> None:
        self.pages: dict[int, bytearray] = {}
        self.changed: set[int] = set()
        self._load = load

    def page(self, index: int) -> bytearray:
        """Return page ``index``; it may be changed only by ``hold``."""
        page = self.pages.get(index)
        if page is None:
            page = bytearray(PAGE_SIZE) if self._load is None else self._load(index)
            self.pages[index] = page
        return page

    def peek(self, index: int) -> bytearray | None:
        """Return page ``index``, and keep nothing; None if it holds no block."""
        page = self.pages.get(index)
        if page is None and self._load is not None:
            page = self._load(index)
        return page if page is not None and page.count(0) != len(page) else None

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the bytes from ``offset`` as (offset, length, True if the store holds them)."""
        position, end = offset, offset + length
        while position < end:
            block = position // BLOCK_SIZE
            page, first = divmod(block, BLOCKS_PER_PAGE)
            last = min(BLOCKS_PER_PAGE, first + block_count(end) - block)
            for count, is_held in bit_runs(self.page(page), first, last):
                stop = min(end, (position // BLOCK_SIZE + count) * BLOCK_SIZE)
                yield position, stop - position, is_held
                position = stop

    def hold(self, offset: int, length: int) -> None:
        """Mark the blocks of these bytes as held by the store."""
        block, end = offset // BLOCK_SIZE, block_count(offset + length)
        while block < end:
            index, first = divmod(block, BLOCKS_PER_PAGE)
            last = min(BLOCKS_PER_PAGE, first + end - block)
            page = self.page(index)
            low, high = first // 8, -(-last // 8)
            old = int.from_bytes(page[low:high], "little")
            new = old | ((1 << (last - first)) - 1) << first % 8
            if new != old:
                page[low:high] = new.to_bytes(high - low, "little")
                self.changed.add(index)
            block += last - first

    def held_blocks(self) -> int:
        """Return how many blocks the pages that are loaded say are held."""
        return sum(int.from_bytes(page, "little").bit_count() for page in self.pages.values())


def bit_runs(page: bytes | bytearray, first: int, last: int) -> Iterator[tuple[int, bool]]:
    """Yield the bits ``first`` to ``last`` - 1 of ``page`` as (how many are equal, set or not)."""
    run, is_set = 0, False
    while first < last:
        # Operations on integers of a whole page would cost more than all else.
        stop = min(last, (first // _BITS_AT_ONCE + 1) * _BITS_AT_ONCE)
        left = stop - first
        bits = int.from_bytes(page[first // 8 : -(-stop // 8)], "little") >> first % 8
        bits &= (1 << left) - 1
        first = stop
        while left:
            is_held = bool(bits & 1)
            # The lowest bit that differs from the run, or everything that is left.
            other = bits ^ ((1 << left) - 1) if is_held else bits
            count = (other & -other).bit_length() - 1 if other else left
            if run and is_held != is_set:
                yield run, is_set
                run = 0
            run, is_set = run + count, is_held
            bits >>= count
            left -= count
    if run:
        yield run, is_set
