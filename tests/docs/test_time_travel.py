"""docs/time-travel.md: its example runs as it stands, and its numbers are the code's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.snapshot.checkpoints import MAX_BYTES, MAX_COUNT
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "time-travel.md").read_text(encoding="utf-8")


@pytest.mark.kvm
def test_the_example_runs_as_it_stands() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, text=True, capture_output=True, check=False,
        timeout=patient(300), stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.fullmatch(r"0x[0-9a-f]+\n", done.stdout)


def test_the_limits_are_those_of_the_code() -> None:
    assert f"At most {MAX_COUNT} checkpoints are kept, and {MAX_BYTES >> 30} GiB of RAM" in TEXT
