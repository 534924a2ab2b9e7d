"""``HaltWatch`` of ``pyvmm.run.halts``: when to look whether a guest has halted for good."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from pyvmm.run.halts import (
    ANNOUNCED_POLL_S,
    ANNOUNCED_S,
    FIRST_WINDOW_S,
    LONGEST_WINDOW_S,
    REGULAR_S,
    HaltWatch,
)


def looks(watch: HaltWatch, used_s: Callable[[float], float], until_s: float) -> list[float]:
    """When ``watch`` wants to look, of a guest that at ``t`` has used so much CPU time."""
    found = []
    while (now_s := watch.due_s) < until_s:
        if watch.is_worth_it(now_s, used_s(now_s)):
            found.append(now_s)
    return found


def test_a_guest_that_does_nothing_is_looked_at_less_and_less() -> None:
    times = looks(HaltWatch(0.0), lambda _: 0.0, 1000.0)
    assert times[:4] == [2, 6, 14, 22]
    assert times[-1] - times[-2] == LONGEST_WINDOW_S


@pytest.mark.parametrize("work_s", [0.0, 0.5])
@pytest.mark.parametrize("halt_s", range(3600, 3610))
def test_a_halt_after_a_long_rest_is_looked_at_within_seconds(work_s: float, halt_s: int) -> None:
    """Its last act costs next to no CPU time, or some."""
    times = looks(HaltWatch(0.0), lambda t: work_s * (t >= halt_s), 3700.0)
    assert min(t for t in times if t > halt_s) <= halt_s + 1.5 * LONGEST_WINDOW_S


@pytest.mark.parametrize("share", [0.02, 1.0, 8.0])
def test_a_busy_guest_is_looked_at_seldom(share: float) -> None:
    """But it is: timers that it left on keep the threads of a halted guest busy."""
    times = [0.0, *looks(HaltWatch(0.0), lambda now_s: share * now_s, 1000.0)]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert REGULAR_S <= min(gaps_s) <= max(gaps_s) <= REGULAR_S + FIRST_WINDOW_S


def test_a_halt_after_work_is_looked_at_soon() -> None:
    """Within two windows, even if timers that nobody serves still wake the vCPU."""
    times = looks(HaltWatch(0.0), lambda t: min(t, 99.0) + 0.002 * t, 200.0)
    soonest_s = min(t for t in times if t > 99)
    assert 99 + FIRST_WINDOW_S <= soonest_s <= 99 + 2 * FIRST_WINDOW_S


def test_work_makes_the_windows_shorter_again() -> None:
    """An hour of rest, five minutes of work, and it halts."""
    rest_s, halt_s = 3600.0, 3900.0
    times = looks(HaltWatch(0.0), lambda t: min(max(t - rest_s, 0.0), halt_s - rest_s), 4000.0)
    assert len([t for t in times if t <= rest_s]) <= 2 + rest_s / LONGEST_WINDOW_S
    at_work = [t for t in times if rest_s + LONGEST_WINDOW_S < t < halt_s]
    assert len(at_work) <= (halt_s - rest_s) / REGULAR_S
    assert min(t for t in times if t >= halt_s) <= halt_s + 2 * FIRST_WINDOW_S


def test_a_pause_is_no_rest() -> None:
    watch = HaltWatch(0.0)
    looks(watch, lambda _: 0.0, 100.0)
    watch.start_anew(200.0, 5.0)
    times = looks(watch, lambda t: 5.0 + max(t - 200.0, 0.0) * 0.5, 300.0)
    assert times[0] >= 200 + REGULAR_S


def test_an_announced_halt_is_looked_for_at_once_and_for_a_while() -> None:
    watch = HaltWatch(0.0)
    watch.announce(1.0)
    times = looks(watch, lambda t: t, ANNOUNCED_S + REGULAR_S)
    assert times[0] == 1.0
    assert times[1] == pytest.approx(1.0 + ANNOUNCED_POLL_S)
    assert times[-1] == pytest.approx(1.0 + ANNOUNCED_S, abs=2 * ANNOUNCED_POLL_S)
