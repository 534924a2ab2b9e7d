"""Snapshots that have only what differs from the one that their machine came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.errors import SnapshotError
from pyvmm.report import Reporter
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.opening import open_snapshot
from tests.support.disk_guest import (
    built,
    rounds_done,
)
from tests.support.snapshots import (
    at_rounds,
    clone_of,
    ending,
    finish,
    snapshot_machine,
)

pytestmark = pytest.mark.bare

ROUNDS = 300
WAIT_S = 30.0


def test_a_chain_of_diffs_goes_on_where_the_last_was_taken(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        at_rounds(machine, 20)
        take(machine, tmp_path / "0").close()
    counts = []
    for number in range(1, 4):
        with (
            open_snapshot(tmp_path / f"{number - 1}", report=Reporter()) as snapshot,
            ending(clone_of(snapshot)) as clone,
        ):
            at_rounds(clone, rounds_done(clone) + 40)
            diff = take(clone, tmp_path / f"{number}", diff=True)
            with diff, ending(clone_of(diff)) as again:
                counts.append(rounds_done(again))
            assert (tmp_path / f"{number}" / "ram").stat().st_blocks * 512 < 1 << 20
    assert counts == sorted(counts)
    for number in (3, 2, 0):
        snapshot = open_snapshot(tmp_path / f"{number}", report=Reporter())
        with snapshot, ending(clone_of(snapshot)) as clone:
            finish(clone, ROUNDS)


def test_a_diff_needs_a_directory_to_be_over(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=3))) as machine:
        with pytest.raises(SnapshotError, match=r"^snapshot\(\): a diff is a directory over"):
            take(machine, tmp_path / "diff", diff=True)
        with (
            take(machine) as snapshot, ending(clone_of(snapshot)) as clone,
            pytest.raises(SnapshotError, match="a diff is a directory over another one"),
        ):
            take(clone, tmp_path / "diff", diff=True)
