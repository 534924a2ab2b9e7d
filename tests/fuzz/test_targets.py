"""Every fuzz target runs for a second, with one seed, and finds nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.target import about, committed_cases, target_names
from tests.support.patience import patient

SECONDS = 1.5


@pytest.mark.parametrize("name", target_names())
def test_nothing_is_found(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", name, "--seconds", str(SECONDS), "--seed", "11",
         "--plain", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=patient(200), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / name / "summary.json").read_text())
    assert summary["runs"] > len(committed_cases(name))
    assert summary["found"] == []


def test_every_target_says_what_it_is() -> None:
    names = target_names()
    assert {"registers", "rings", "ports", "kernel", "text", "nbd", "overlay", "driver",
            "vhost-user-backend", "vhost-user-frontend"} <= set(names)
    for name in names:
        assert len(about(name)) > 20, name
