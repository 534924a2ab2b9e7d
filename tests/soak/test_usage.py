"""What a process takes, and whether it grows."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

import pytest

from soak.usage import NAMES, Drift, Usage, drift_figures, growth, longest


def samples(own_kib: list[int], stretch: int = 1) -> list[Mapping[str, object]]:
    return [{"stretch": stretch, **dict.fromkeys(NAMES, 100), "own_kib": own} for own in own_kib]


def test_a_process_is_seen_as_it_is() -> None:
    before = Usage.of(0, ram_kib=0)
    assert before.rss_kib == before.own_kib > 1000
    read, write = os.pipe()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    after = Usage.of(os.getpid(), ram_kib=0)
    stop.set()
    thread.join()
    os.close(read)
    os.close(write)
    assert after.descriptors - before.descriptors == 2
    assert after.threads - before.threads == 1
    assert after.mappings > 10


def test_the_guests_ram_is_left_out() -> None:
    from pyvmm.memory import GuestMemory

    size = (37 << 20) + 4096
    with GuestMemory([(0, size)]) as memory:
        memory.write(0, bytes(1 << 20))
        usage = Usage.of(0, ram_kib=size >> 10)
    assert usage.rss_kib - usage.own_kib >= 1024


@pytest.mark.parametrize(("values", "grows"), [
    ([100_000] * 100, False),
    ([50_000] * 9 + [100_000] * 91, False),  # the first ones fill caches
    ([100_000, 101_500, 99_000, 100_000] * 25, False),
    ([100_000 + 5 * n for n in range(100)], False),
    ([100_000 + 50 * n for n in range(100)], True),
    ([100_000] * 60 + [101_200] * 40, True),
    ([200_000 - 100 * n for n in range(100)], False),
])
def test_growth_of_one_per_cent_is_found(values: list[int], grows: bool) -> None:
    found = growth(samples(values))
    assert found.startswith("grown: own_kib ") if grows else found == ""


def test_a_leak_of_one_descriptor_is_found() -> None:
    leaking = [{**line, "descriptors": 26 + n // 50} for n, line in enumerate(samples([1] * 100))]
    assert "descriptors 26 -> 27" in growth(leaking)


def test_only_the_longest_stretch_counts() -> None:
    trials = samples([1] * 5, 1) + samples([2] * 7, 2) + samples([3] * 6, 3)
    assert longest(trials, 7) == samples([2] * 7, 2)
    assert longest(trials, 8) == []
    assert growth([]) == ""
    assert drift_figures([]) == {}
    assert drift_figures(longest(trials, 1))["own_kib, first to last quarter"] == (
        "2 -> 2 (+0.00 %)"
    )
    assert Drift(0, 5).percent == 0.0
