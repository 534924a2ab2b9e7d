"""Descriptors that a process inherited, or forgot, are closed; those of the list stay."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.jail import descriptors
from tests.support.apart import apart, refuse_calls

CLOSE_RANGE = 436


def open_descriptors() -> set[int]:
    """Return the open descriptors, without that of the look itself."""
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in found if os.path.lexists(f"/proc/self/fd/{fd}")}


@pytest.mark.parametrize("refusal", [0, errno.ENOSYS, errno.EPERM])
def test_all_but_those_of_the_list_are_closed(refusal: int) -> None:
    """Also on a kernel, or in a container, without close_range(2)."""
    def body(fd: int) -> tuple[set[int], set[int]]:
        forgotten = [os.dup(0) for _ in range(5)]
        os.dup2(0, 777)
        kept = {0, 1, 2, fd, forgotten[1], forgotten[3]}
        if refusal:
            refuse_calls(refusal, CLOSE_RANGE)
        assert open_descriptors() > kept
        descriptors.close_others(kept)
        return kept, open_descriptors()

    kept, left = apart(body)
    assert left == kept


def test_a_descriptor_of_the_list_that_is_closed_already_does_no_harm() -> None:
    def body(fd: int) -> set[int]:
        descriptors.close_others([0, 1, 2, fd, 900])
        return open_descriptors() - {fd}

    assert apart(body) == {0, 1, 2}


def test_another_failure_is_told() -> None:
    def body(fd: int) -> None:
        refuse_calls(errno.EIO, CLOSE_RANGE)
        descriptors.close_others([0, 1, 2, fd])

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        apart(body)


@given(st.sets(st.integers(0, 200)))
def test_the_gaps_are_all_numbers_but_the_kept_ones(kept: set[int]) -> None:
    gaps = list(descriptors._gaps(kept))
    assert gaps[-1][1] == (1 << 31) - 1
    in_gaps = [fd for first, last in gaps for fd in range(first, min(last, 300) + 1)]
    assert in_gaps == sorted(set(range(301)) - kept)
