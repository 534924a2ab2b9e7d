"""Shells made ahead by threads: all that were asked for, and none is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import HostError
from pyvmm.snapshot.shell import Shell
from pyvmm.snapshot.shells import MAKERS, Shells
from pyvmm.snapshot.snapshot import Snapshot
from tests.support.patience import patient

WAIT_S = 20.0


class StandInShell:
    """Counts how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class StandInSnapshot:
    """Makes shells, ``most`` of them at most, while ``gate`` is open."""

    name = "the snapshot"

    def __init__(self, most: int = 1 << 30, error: Exception | None = None) -> None:
        self.made: list[StandInShell] = []
        self.gate = threading.Event()
        self.gate.set()
        self._most = most
        self._error = error or HostError("no more descriptors")
        self._lock = threading.Lock()

    def build_shell(self, *, report: Callable[[str], None]) -> Shell:
        self.gate.wait(patient(WAIT_S))
        with self._lock:
            if len(self.made) >= self._most:
                raise self._error
            self.made.append(StandInShell())
            return cast(Shell, self.made[-1])


def shells_of(snapshot: StandInSnapshot, lines: list[str]) -> Shells:
    return Shells(cast(Snapshot, snapshot), lines.append)


@given(steps=st.lists(st.integers(0, 5) | st.just("take"), max_size=12))
def test_all_that_were_asked_for_are_taken_or_closed(steps: list[int | str]) -> None:
    snapshot, lines, taken = StandInSnapshot(), list[str](), list[Shell]()
    shells = shells_of(snapshot, lines)
    asked = 0
    for step in steps:
        if isinstance(step, int):
            shells.prepare(step)
            asked += step
        elif (shell := shells.take()) is not None:
            taken.append(shell)
    assert shells.wait(patient(WAIT_S))
    assert len(snapshot.made) == asked
    assert shells.ready == asked - len(taken)
    shells.close()
    shells.close()
    assert [one.closed for one in snapshot.made] == [
        0 if id(one) in set(map(id, taken)) else 1 for one in snapshot.made
    ]
    assert lines == []


def test_close_ends_what_is_under_way() -> None:
    snapshot = StandInSnapshot()
    snapshot.gate.clear()
    shells = shells_of(snapshot, [])
    shells.prepare(100)
    closer = threading.Thread(target=shells.close)
    closer.start()
    until_s = time.monotonic() + patient(WAIT_S)
    while not shells._is_closed:
        assert time.monotonic() < until_s
        time.sleep(0.001)
    snapshot.gate.set()
    closer.join(patient(WAIT_S))
    assert not closer.is_alive()
    assert len(snapshot.made) <= MAKERS
    assert [one.closed for one in snapshot.made] == [1] * len(snapshot.made)
    assert shells.take() is None


@pytest.mark.parametrize("error", [HostError("no more descriptors"), OSError(24, "no more of it")])
def test_a_host_that_is_exhausted_is_told_of_and_the_rest_given_up(error: Exception) -> None:
    snapshot, lines = StandInSnapshot(most=3, error=error), list[str]()
    shells = shells_of(snapshot, lines)
    shells.prepare(50)
    assert shells.wait(patient(WAIT_S))
    assert shells.ready == 3
    assert 1 <= len(lines) <= MAKERS
    assert lines[0].startswith("the snapshot: no more clones are prepared: ")
    shells.close()
    assert [one.closed for one in snapshot.made] == [1, 1, 1]
