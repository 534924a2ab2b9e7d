"""Runs: joined, united and made coarser as the sets of bytes that they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.ram.runs import MOST_RUNS, Run, coarser, joined, total, union

PAGE = 4096
PAGES = 64


def runs_of(pages: set[int]) -> list[Run]:
    return list(joined((page * PAGE, PAGE) for page in sorted(pages)))


def pages_of(runs: Sequence[Run]) -> set[int]:
    assert all(offset % PAGE == 0 == length % PAGE and length for offset, length in runs)
    found = [page for o, n in runs for page in range(o // PAGE, (o + n) // PAGE)]
    assert len(found) == len(set(found)), "runs overlap"
    assert found == sorted(found), "runs do not ascend"
    return set(found)


SOME_PAGES = st.sets(st.integers(0, PAGES - 1))


@given(SOME_PAGES)
def test_neighbours_are_joined(pages: set[int]) -> None:
    runs = runs_of(pages)
    assert pages_of(runs) == pages
    assert all(first[0] + first[1] < second[0] for first, second in itertools.pairwise(runs))
    assert total(runs) == len(pages) * PAGE


@given(SOME_PAGES, SOME_PAGES)
def test_a_union_has_the_pages_of_both(first: set[int], second: set[int]) -> None:
    assert pages_of(union(runs_of(first), runs_of(second))) == first | second


@given(SOME_PAGES, st.integers(1, 8))
def test_coarser_runs_are_few_and_contain_the_finer(pages: set[int], most: int) -> None:
    runs = coarser(runs_of(pages), PAGES * PAGE, most)
    assert len(runs) <= most
    assert pages_of(runs) >= pages
    assert not runs or runs[-1][0] + runs[-1][1] <= PAGES * PAGE


def test_few_runs_stay_as_they_are() -> None:
    runs = [(0, PAGE), (3 * PAGE, 2 * PAGE)]
    assert coarser(runs, 1 << 30) == runs


def test_every_other_page_of_4_gib_is_few_runs() -> None:
    size = 4 << 30
    runs = [(at, PAGE) for at in range(0, size, 2 * PAGE)]
    assert len(coarser(runs, size)) <= MOST_RUNS


def test_a_granule_does_not_reach_beyond_the_end() -> None:
    size = 7 * PAGE
    assert coarser([(0, PAGE), (6 * PAGE, PAGE)], size, 1) == [(0, size)]
