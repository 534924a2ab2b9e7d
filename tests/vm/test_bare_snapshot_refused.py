"""Snapshots that are refused, before the guest is paused, and states that somebody has spoilt."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pyvmm.config import VhostUserDiskConfig
from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine
from pyvmm.report import Reporter
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.files.records import decode, encode
from pyvmm.snapshot.opening import open_snapshot
from tests.support.disk_guest import (
    built,
    disk_machine,
)
from tests.support.export_process import Export
from tests.support.snapshots import (
    at_rounds,
    clone_of,
    ending,
    finish,
    snapshot_machine,
)
from tests.support.virtio_states import junk, replaced, walk, without

pytestmark = pytest.mark.bare

ROUNDS = 300
WAIT_S = 30.0


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Machine]:
    with ending(built(disk_machine(tmp_path, rounds=1 << 30))) as machine:
        yield at_rounds(machine, 3)


@pytest.mark.parametrize("directory", [None, "saved"])
def test_a_disk_written_in_place_is_refused_before_the_guest_is_paused(
    running: Machine, tmp_path: Path, directory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold(*_: object) -> bool:
        raise AssertionError("the guest is held")

    monkeypatch.setattr(running.runner, "hold", hold)
    place = None if directory is None else tmp_path / directory
    with pytest.raises(SnapshotError, match=r"disk\.img.*snapshot or .*overlay="):
        take(running, place)
    assert not running.is_paused
    assert list(tmp_path.glob("saved*")) == []


def test_a_directory_that_is_there_is_refused_before_the_guest_is_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").mkdir()
    with ending(built(snapshot_machine(tmp_path, rounds=3))) as machine:
        monkeypatch.setattr(machine.runner, "hold", None)
        with pytest.raises(SnapshotError, match="saved: is there already"):
            take(machine, tmp_path / "saved")


def test_a_machine_that_has_ended_is_not_saved(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=3))) as machine:
        finish(machine, 3)
        with pytest.raises(SnapshotError, match=r"^snapshot\(\): the run is over"):
            take(machine)
    with pytest.raises(RuntimeError, match="closed"):
        take(machine)


def test_a_served_disk_is_refused_before_the_guest_is_paused(tmp_path: Path) -> None:
    (tmp_path / "exported.img").write_bytes(bytes(1 << 20))
    config = snapshot_machine(tmp_path, rounds=1 << 30)
    for place in (None, tmp_path / "saved"):
        with Export(tmp_path / "exported.img", tmp_path / "socket"):
            disks = (*config.disks, VhostUserDiskConfig(socket=str(tmp_path / "socket")))
            with ending(built(config.replace(disks=disks))) as machine:
                at_rounds(machine, 3)
                with pytest.raises(SnapshotError, match=r"virtio1.*vhost-user.*have pyvmm serve"):
                    take(machine, place)
                assert not machine.is_paused
        (tmp_path / "socket").unlink(missing_ok=True)
    assert not (tmp_path / "saved").exists()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path]:
    """The records of a snapshot in a directory."""
    folder = tmp_path_factory.mktemp("records")
    with ending(built(snapshot_machine(folder, rounds=ROUNDS, cpus=2))) as machine:
        at_rounds(machine, 20)
        take(machine, folder / "saved").close()
    return decode((folder / "saved" / "state").read_bytes(), name="state"), folder / "saved"


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_spoilt_record_is_one_error_or_accepted(
    records: tuple[dict[str, object], Path], data: st.DataObject
) -> None:
    good, saved = records
    path = data.draw(st.sampled_from([path for path, _ in walk(good)]), "path")
    if data.draw(st.booleans(), "removed"):
        spoilt = without(good, path)
    else:
        spoilt = replaced(good, path, data.draw(junk, "junk"))
    assert isinstance(spoilt, dict)
    try:
        content = encode(spoilt, name="state")
    except (TypeError, SnapshotError):
        assume(False)
    with TemporaryDirectory(dir=saved.parent) as folder:
        other = Path(folder) / "other"
        shutil.copytree(saved, other)
        (other / "state").unlink()
        (other / "state").write_bytes(content)
        (other / "ram").chmod(0o400)
        with (
            contextlib.suppress(SnapshotError),
            open_snapshot(other, report=Reporter()) as snapshot, clone_of(snapshot),
        ):
            pass
