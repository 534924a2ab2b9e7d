"""A chain of diffs of a guest that drives a disk, merged: the same machine goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pyvmm.report import Reporter
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.files.check import problems
from pyvmm.snapshot.files.merge import merge
from pyvmm.snapshot.files.saved import open_saved
from pyvmm.snapshot.opening import open_snapshot
from tests.support.disk_guest import built, rounds_done, wait_for_rounds
from tests.support.snapshots import ending, finish, snapshot_machine

pytestmark = pytest.mark.bare

ROUNDS = 200


@pytest.mark.parametrize("live", [False, True])
def test_a_merged_chain_goes_on_like_its_last_diff(tmp_path: Path, live: bool) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        machine.start()
        wait_for_rounds(machine, 10)
        take(machine, tmp_path / "0", live=live).close()
    for number in (1, 2):
        with (
            open_snapshot(tmp_path / f"{number - 1}", report=Reporter()) as snapshot,
            ending(snapshot.clone(report=Reporter())) as clone,
        ):
            clone.start()
            wait_for_rounds(clone, rounds_done(clone) + 30)
            take(clone, tmp_path / f"{number}", diff=True, live=live).close()
    with open_saved(tmp_path / "2") as saved:
        assert len(saved.chain) == 3
        assert list(problems(saved, {}, report=print)) == []
        merge(saved, tmp_path / "full")
    with (
        open_snapshot(tmp_path / "2", report=Reporter()) as snapshot,
        ending(snapshot.clone(report=Reporter())) as clone,
    ):
        done = rounds_done(clone)
    for number in range(3):
        shutil.rmtree(tmp_path / f"{number}")
    with (
        open_snapshot(tmp_path / "full", report=Reporter()) as snapshot,
        ending(snapshot.clone(report=Reporter())) as clone,
    ):
        assert rounds_done(clone) == done
        finish(clone, ROUNDS)
