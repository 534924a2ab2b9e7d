"""The soak's parts with Linux guests, for a minute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from soak.journal import read_lines
from soak.processes import ROOT
from tests.support.patience import patient

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(3600)]

SIZES = {"kills": 4, "crowd": 3, "fio": 20}


def test_each_part_does_what_is_asked_and_finds_nothing(tmp_path: Path) -> None:
    words = [f"{name}={size}" for name, size in SIZES.items()]
    done = subprocess.run(
        [sys.executable, "-m", "soak", "--here", "--fresh", "--jobs", "1", *words,
         "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=patient(900), check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {name: list(read_lines(tmp_path / f"{name}.jsonl")) for name in SIZES}
    trials = {name: [line for line in found if "trial" in line] for name, found in lines.items()}
    assert {line["kind"] for line in trials["kills"]} == {"booted", "raw", "overlay"}
    assert all(line["acked"] for line in trials["kills"])
    assert [line["trial"] for line in trials["crowd"]] == [SIZES["crowd"]]
    assert len(trials["fio"]) == 2
