"""Power cuts under a Linux guest: whatever a cut leaves of the unflushed writes, nothing is lost.

One guest is recorded, in the lab where this host's KVM cannot boot one; then, at each of its
flushes, images are made with random subsets of the writes since the last flush, torn at 512 bytes.
``make soak`` does 10,000 of them, from guests of four kinds (``soak/parts/cuts.py``).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.power_cut import Flush, NumberedCuts, PowerCut
from tests.support.recorded_guest import RECORDS, Recording, acknowledged, check_cut, recording

pytestmark = [pytest.mark.power_cut, pytest.mark.timeout(7200)]

COUNT = 200


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """The disk of a guest with one writer, and everything done to it."""
    return recording(tmp_path_factory.mktemp("recording"))


def check(cut: PowerCut, folder: Path) -> None:
    """Check ``cut`` in ``folder``, which is removed."""
    folder.mkdir()
    try:
        check_cut(cut, folder)
    finally:
        shutil.rmtree(folder)


def test_acknowledged_records_survive_every_power_cut(
    recorded: Recording, tmp_path: Path
) -> None:
    initial, log = recorded
    acked = acknowledged(log)
    assert acked == [f"1-{number}" for number in range(1, len(acked) + 1)]
    assert len(acked) >= RECORDS
    flushes = sum(isinstance(event, Flush) for event in log)
    assert flushes >= len(acked)
    cuts = NumberedCuts(initial, log)
    # Spread over all the moments, of which there may be more than cuts.
    for number in range(COUNT):
        check(cuts.make(number * (flushes + 1) // COUNT), tmp_path / "cut")


def test_a_flush_that_is_not_kept_loses_records(recorded: Recording, tmp_path: Path) -> None:
    """The test above is able to fail: a disk whose flushes do nothing loses acked records."""
    initial, log = recorded
    cuts = NumberedCuts(initial, [event for event in log if not isinstance(event, Flush)])
    failures = 0
    for number in range(10):
        try:
            check(cuts.make(number), tmp_path / "cut")
        except (AssertionError, FileNotFoundError):
            failures += 1
    assert failures > 0
