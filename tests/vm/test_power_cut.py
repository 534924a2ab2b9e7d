"""Power cuts under a Linux guest: whatever a cut leaves of the unflushed writes, nothing is lost.

One guest is recorded, in the lab where this host's KVM cannot boot one; then, at each of its
flushes, images are made with random subsets of the writes since the last flush, torn at 512 bytes.
``PYVMM_POWER_CUTS`` is the number of images, 200 unless set.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.guest import ROOT, environment
from tests.support.patience import patient
from tests.support.power_cut import Flush, Note, RecordingBackend, Write, power_cuts

pytestmark = [pytest.mark.power_cut, pytest.mark.timeout(7200)]

GUEST_SECONDS = 20
SEED = 5


Recording = tuple[bytearray, list[Write | Flush | Note]]
"""The disk before, and everything done to it."""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """What the guest of record_guest did to its disk."""
    tmp_path = tmp_path_factory.mktemp("recording")
    disk, out = tmp_path / "disk.img", tmp_path / "log.pickle"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
    pyvmm = [sys.executable, "-m", "pyvmm"]
    can_boot = subprocess.run([*pyvmm, "doctor", "--quiet"], env=environment(), check=False)
    host = [] if can_boot.returncode == 0 else [*pyvmm, "lab", "--rw", str(tmp_path), "--"]
    subprocess.run(
        [*host, sys.executable, "-m", "tests.support.record_guest", str(disk),
         str(patient(GUEST_SECONDS)), str(out)],
        cwd=ROOT, env=environment(), check=True, timeout=patient(300),
    )
    initial, log = pickle.loads(out.read_bytes())
    return bytearray(initial), log


def check(image: Path, last_acked: int, into: Path) -> None:
    """Replay the journal; then the file system must be clean and every acked record whole."""
    subprocess.run(
        ["e2fsck", "-y", "-E", "journal_only", image], capture_output=True, check=False
    )
    clean = subprocess.run(
        ["e2fsck", "-fn", image], capture_output=True, text=True, check=False
    )
    assert clean.returncode == 0, clean.stdout
    subprocess.run(
        ["debugfs", "-R", f"rdump / {into}", image], capture_output=True, check=True
    )
    for number in range(1, last_acked + 1):
        assert (into / f"r{number}").read_text() == f"record {number}\n"


def test_acknowledged_records_survive_every_power_cut(
    recording: Recording, tmp_path: Path
) -> None:
    initial, log = recording
    acked = [event.value for event in log if isinstance(event, Note)]
    assert acked == list(range(1, len(acked) + 1))
    assert len(acked) >= 10
    assert sum(isinstance(event, Flush) for event in log) >= len(acked)

    count = int(os.environ.get("PYVMM_POWER_CUTS", "200"))
    recorder = RecordingBackend.__new__(RecordingBackend)
    recorder.initial, recorder.log = initial, log
    image, into = tmp_path / "cut.img", tmp_path / "files"
    checked = 0
    for cut in power_cuts(recorder, random.Random(SEED), count):
        image.write_bytes(cut.image)
        into.mkdir()
        check(image, len(cut.notes), into)
        shutil.rmtree(into)
        checked += 1
    assert checked == count


def test_a_flush_that_is_not_kept_loses_records(recording: Recording, tmp_path: Path) -> None:
    """The test above is able to fail: a disk whose flushes do nothing loses acked records."""
    initial, log = recording
    recorder = RecordingBackend.__new__(RecordingBackend)
    recorder.initial = initial
    recorder.log = [event for event in log if not isinstance(event, Flush)]
    image, into = tmp_path / "cut.img", tmp_path / "files"
    failures = 0
    for cut in power_cuts(recorder, random.Random(SEED), 10):
        image.write_bytes(cut.image)
        into.mkdir()
        try:
            check(image, len(cut.notes), into)
        except (AssertionError, FileNotFoundError):
            failures += 1
        shutil.rmtree(into)
    assert failures > 0
