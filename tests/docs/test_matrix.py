"""docs/matrix.md and the example: what they show is a matrix, and every key is told of."""

from __future__ import annotations

import re
from pathlib import Path

from pyvmm.cli.parse import parse_disk
from pyvmm.matrix import entries, plan
from pyvmm.matrix.expand import MAX_RUNS, runs_of

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")


def test_the_file_that_is_shown_is_a_matrix(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    path = tmp_path / "boot.toml"
    path.write_text(shown)
    runs = runs_of(plan.read_plan(str(path), parse_disk))
    assert len(runs) == 12
    assert "mine+root+256M+2cpu+module" in TEXT
    assert "mine+root+256M+2cpu+module" in [run.name for run in runs]


def test_the_example_is_a_matrix() -> None:
    path = ROOT / "examples" / "matrix" / "boot.toml"
    runs = runs_of(plan.read_plan(str(path), parse_disk))
    assert len(runs) == 9
    assert {run.guest.kernel for run in runs} == {str(ROOT / "build" / "bzImage")}


def test_the_page_tells_of_every_key_and_limit() -> None:
    words = set(re.findall(r"[\w-]+", TEXT))
    keys = {*plan.TOP_KEYS, *entries.COMMAND_KEYS, *entries.KERNEL_KEYS, *entries.DISK_KEYS}
    assert keys - words == set()
    assert str(MAX_RUNS) in words
