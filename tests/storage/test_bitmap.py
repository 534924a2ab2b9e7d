"""Bitmaps of blocks: runs of bits, and the pages that are kept."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.storage.bitmap import BLOCK_SIZE, BLOCKS_PER_PAGE, PAGE_SIZE, BlockBitmap, bit_runs

BYTES = st.one_of(
    st.binary(min_size=1, max_size=40),
    # long runs, across the pieces in which a page is looked at
    st.lists(st.sampled_from([bytes(100), b"\xff" * 100, b"\x55" * 100, b"\x80"]), min_size=1,
             max_size=6).map(b"".join),
)


@given(page=BYTES, data=st.data())
def test_runs_are_those_of_the_bits(page: bytes, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 8 * len(page)))
    last = data.draw(st.integers(first, 8 * len(page)))
    bits = [bool(page[n // 8] >> n % 8 & 1) for n in range(first, last)]
    expected = [(len(list(run)), is_set) for is_set, run in groupby(bits)]
    assert list(bit_runs(page, first, last)) == expected


@given(ranges=st.lists(st.tuples(st.integers(0, 3 * BLOCKS_PER_PAGE), st.integers(1, 9999)),
                       max_size=6))
def test_a_bitmap_holds_what_it_was_told(ranges: list[tuple[int, int]]) -> None:
    bitmap, held = BlockBitmap(), set[int]()
    for first, count in ranges:
        bitmap.hold(first * BLOCK_SIZE, count * BLOCK_SIZE)
        held |= set(range(first, first + count))
    assert bitmap.held_blocks() == len(held)
    assert bitmap.changed == set(bitmap.pages) == {block // BLOCKS_PER_PAGE for block in held}
    found = set[int]()
    for start, length, is_held in bitmap.runs(0, 4 * BLOCKS_PER_PAGE * BLOCK_SIZE):
        if is_held:
            found |= set(range(start // BLOCK_SIZE, (start + length) // BLOCK_SIZE))
    assert found == held


@pytest.mark.parametrize("byte", [0, 1])
def test_a_look_keeps_nothing(byte: int) -> None:
    bitmap = BlockBitmap(lambda index: bytearray([byte]) * PAGE_SIZE)
    assert (bitmap.peek(3) is None) == (not byte)
    assert bitmap.pages == {}
