"""``pyvmm run --snapshot`` killed at any moment of a save: a whole snapshot, or none."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, SPIN
from tests.support.warm_runs import WARM, Warmed, finished, pyvmm

pytestmark = pytest.mark.bare

KILLS = 8
MOST_KILLS = 80
LONGEST_S = 0.08


@pytest.mark.parametrize("live", [False, True])
def test_a_kill_in_the_midst_of_a_save(tmp_path: Path, live: bool) -> None:
    warmed = Warmed(tmp_path)
    half = Path(f"{warmed.directory}.tmp")
    words = warmed.run_words(WARM, SPIN, options=["--snapshot-live"] if live else [])
    left = tmp_path / "left"
    generator = random.Random(live)
    seen: Counter[str] = Counter()
    longest_s = LONGEST_S
    # A save may be quick beside a busy machine's sleeps: then sooner, until one is hit.
    for turn in range(MOST_KILLS):
        if turn >= KILLS and seen["half"]:
            break
        process = subprocess.Popen(
            words, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + patient(30)
        while not (half.exists() or warmed.directory.exists()) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(generator.random() * longest_s)
        process.kill()
        process.wait()
        if warmed.directory.exists():
            seen["whole"] += 1
            longest_s /= 2
            assert not half.exists()
            status, _, said = finished(pyvmm("snapshot", "check", warmed.directory))
            assert (status, said) == (0, "")
            shutil.rmtree(warmed.directory)
        elif half.exists():
            seen["half"] += 1
            longest_s = LONGEST_S
            status, _, said = finished(pyvmm("restore", half))
            assert (status, said.count("\n")) == (125, 1)
            assert "is an unfinished snapshot" in said
            shutil.rmtree(left, ignore_errors=True)
            half.rename(left)
    assert seen["half"], seen
    left.rename(half)  # the next save takes it over
    warmed.run(WARM, REPORT_7)
    assert not half.exists()
    assert warmed.restore()[0] == 7
