"""Snapshots, checkpoints and rewinds of one machine by several threads come one after the other."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pyvmm.errors import SnapshotError
from pyvmm.ram.live import LiveWriter
from pyvmm.ram.write import Written
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.checkpoints import checkpoints_of
from tests.support.disk_guest import built
from tests.support.patience import patient
from tests.support.snapshots import STOPPED, ending, snapshot_machine

pytestmark = pytest.mark.bare

ROUNDS = 300


@pytest.mark.parametrize("directory", [None, "saved"])
def test_a_checkpoint_waits_until_a_live_snapshot_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str | None
) -> None:
    # The child maps the memory of the checkpoints, which the next one changes.
    numbers: list[int] = []
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        kept = checkpoints_of(machine)
        kept.take()
        other = threading.Thread(target=lambda: numbers.append(kept.take()))
        wait = LiveWriter.wait

        def slow(writer: LiveWriter, timeout_s: float | None = None) -> Written:
            other.start()
            other.join(0.3)
            assert not numbers
            return wait(writer, timeout_s)

        monkeypatch.setattr(LiveWriter, "wait", slow)
        take(machine, None if directory is None else tmp_path / directory, live=True).close()
        other.join(patient(30.0))
        assert numbers == [2]
        machine.start()
        kept.rewind()  # to the checkpoint, which is newer than the snapshot
        assert kept.numbers == (1, 2)


def test_a_moment_inside_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        kept = checkpoints_of(machine)

        def handler_of_a_signal(_writer: LiveWriter, _timeout_s: float | None = None) -> Written:
            kept.take()
            raise AssertionError

        monkeypatch.setattr(LiveWriter, "wait", handler_of_a_signal)
        with pytest.raises(RuntimeError, match=r"^checkpoint\(\) inside snapshot\(\) would wait"):
            take(machine, live=True)
        kept.take()


def test_a_run_that_ends_in_the_midst_of_a_checkpoint_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        machine.start()
        save = machine.save

        def ended_meanwhile() -> dict[str, object]:
            machine.runner.finish(STOPPED)
            until_s = time.monotonic() + patient(30.0)
            while not machine.runner.is_over:
                assert time.monotonic() < until_s
                time.sleep(0.001)
            return save()

        monkeypatch.setattr(machine, "save", ended_meanwhile)
        with pytest.raises(SnapshotError, match=r"^checkpoint\(\): the run has ended meanwhile$"):
            checkpoints_of(machine).take()
        assert machine.wait(patient(30.0)) == STOPPED
