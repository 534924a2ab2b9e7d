"""A diff of a machine that has taken checkpoints: its RAM is mapped over these, not its base."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.report import Reporter
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.checkpoints import checkpoints_of
from pyvmm.snapshot.opening import open_snapshot
from tests.support.disk_guest import built, rounds_done, wait_for_rounds
from tests.support.ram_images import content
from tests.support.snapshots import ending, finish, snapshot_machine

pytestmark = pytest.mark.bare

ROUNDS = 200
MARK_GPA = 0xC0_0000


@pytest.mark.parametrize("live", [False, True])
def test_a_diff_after_checkpoints_has_all_since_its_base(tmp_path: Path, live: bool) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        machine.start()
        wait_for_rounds(machine, 10)
        take(machine, tmp_path / "base").close()
    with open_snapshot(tmp_path / "base", report=Reporter()) as snapshot:
        clone = snapshot.clone(report=Reporter())
    with ending(clone):
        clone.start()
        wait_for_rounds(clone, rounds_done(clone) + 20)
        assert clone.pause(30)
        clone.board.memory.write(MARK_GPA, b"before the checkpoint")
        moments = checkpoints_of(clone)
        moments.take()
        clone.board.memory.write(MARK_GPA + 0x10000, b"after it")
        before = content(clone.board.memory)
        take(clone, tmp_path / "diff", diff=True, live=live).close()
    with open_snapshot(tmp_path / "diff", report=Reporter()) as diff:
        again = diff.clone(report=Reporter())
    with ending(again):
        memory = again.board.memory
        assert memory.read(MARK_GPA, 21) == b"before the checkpoint"
        assert memory.read(MARK_GPA + 0x10000, 8) == b"after it"
        now = content(memory)
        # A fresh VM generation ID is all that a clone has of its own before it runs.
        assert sum(one != other for one, other in zip(before, now, strict=True)) <= 16
        finish(again, ROUNDS)
