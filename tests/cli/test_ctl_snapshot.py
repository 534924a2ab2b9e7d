"""``pyvmm ctl SOCKET snapshot``, ``checkpoint`` and ``rewind`` as a user runs them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import SnapshotError
from tests.cli.test_ctl import complaint, ctl
from tests.support.stand_in_saves import StandInSaves
from tests.support.stand_in_target import Served, served


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as found:
        found.target.saves = StandInSaves(found.target)
        yield found


def saves_of(rig: Served) -> StandInSaves:
    assert isinstance(rig.target.saves, StandInSaves)
    return rig.target.saves


def test_a_directory_is_named_from_where_the_user_is(rig: Served, tmp_path: Path) -> None:
    for words in (["snapshot", "a"], ["snapshot", "--live", "--diff", "../b"]):
        done = ctl(rig, *words, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert saves_of(rig).done == [
        f"snapshot {tmp_path}/a", f"snapshot {tmp_path.parent}/b live diff",
    ]


def test_a_directory_without_a_name_is_refused_before_anybody_is_asked(rig: Served) -> None:
    assert complaint(ctl(rig, "snapshot", "")) == "pyvmm: snapshot '': names no directory\n"
    assert saves_of(rig).done == []


def test_a_checkpoint_has_a_number_to_go_back_to(rig: Served) -> None:
    assert ctl(rig, "checkpoint").stdout == b"1\n"
    assert ctl(rig, "checkpoint").stdout == b"2\n"
    assert b"rewind   to checkpoints 1 to 2\n" in ctl(rig, "status").stdout
    assert ctl(rig, "snapshot", "/a").returncode == 0
    assert b"rewind   to snapshot /a, checkpoints 1 to 2\n" in ctl(rig, "status").stdout
    assert ctl(rig, "rewind", "1").returncode == ctl(rig, "rewind").returncode == 0
    assert saves_of(rig).done[3:] == ["rewind 1", "rewind None"]


def test_status_tells_of_the_clone(rig: Served) -> None:
    rig.target.clone_id = uuid.uuid4()
    assert f"clone    {rig.target.clone_id}\n" in ctl(rig, "status").stdout.decode()


def test_what_cannot_be_saved_is_one_line_with_the_reason(rig: Served) -> None:
    saves_of(rig).error = SnapshotError("disk 0", "is written in place: add ,snapshot")
    said = complaint(ctl(rig, "snapshot", "a"))
    assert said == "pyvmm: disk 0: is written in place: add ,snapshot\n"
    saves_of(rig).error = None
    assert "there is nothing to go back to" in complaint(ctl(rig, "rewind"))


def test_a_number_that_is_none_is_named_before_anybody_is_asked(rig: Served) -> None:
    assert complaint(ctl(rig, "rewind", "x")) == (
        "pyvmm: rewind x: is no number of a checkpoint\n"
    )
    assert saves_of(rig).done == []
