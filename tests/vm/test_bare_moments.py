"""Snapshots, checkpoints and rewinds of one machine by several threads come one after the other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pyvmm.ram.live import LiveWriter
from pyvmm.ram.write import Written
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.checkpoints import checkpoints_of
from tests.support.disk_guest import built
from tests.support.patience import patient
from tests.support.snapshots import ending, snapshot_machine

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
