"""The soak's parts with bare guests, for some seconds; and what they would find."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from soak.errors import TrialError
from soak.journal import read_lines
from soak.part import Trial
from soak.parts import bare_kills, faults
from soak.parts.starts import WAYS
from soak.processes import ROOT
from soak.records import RecordsGuest
from tests.support.patience import patient

pytestmark = pytest.mark.bare


def test_each_part_does_what_is_asked_and_finds_nothing(tmp_path: Path) -> None:
    sizes = {
        "bare_kills": len(bare_kills.KINDS), "faults": 2 * len(faults.KINDS),
        "starts": len(WAYS), "machines": 8, "bare_crowd": 6,
    }
    words = [f"{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(
        [sys.executable, "-m", "soak", "--fresh", *words, "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=patient(240), check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, size in sizes.items():
        trials = [line for line in read_lines(tmp_path / f"{name}.jsonl") if "trial" in line]
        assert len(trials) == (1 if name == "bare_crowd" else size)
    kills = [line for line in read_lines(tmp_path / "bare_kills.jsonl") if "trial" in line]
    assert sum(line["acked"] for line in kills) > 0
    failing = [line for line in read_lines(tmp_path / "faults.jsonl") if "trial" in line]
    assert sum(line["errors"] for line in failing) > 0
    assert sum(line["acked"] for line in failing) > 0


@pytest.mark.parametrize("fault", ["write 2: lost", "write 3: torn 100"])
def test_a_disk_that_lies_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Of the writes each is acknowledged, and one is lost or torn."""
    monkeypatch.setattr(faults, "script", lambda _rng: f"{fault}\n")
    guest = RecordsGuest.assembled(tmp_path / "guest")
    folder = tmp_path / "trial"
    folder.mkdir()
    with pytest.raises(TrialError, match=r"lost of|is not its record"):
        faults.fail(Trial(0, random.Random(0), folder), guest)
