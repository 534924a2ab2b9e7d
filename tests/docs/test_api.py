"""docs/api.md and README.md: every example runs as it stands; the page has every name of the face.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyvmm
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README + TEXT, re.MULTILINE | re.DOTALL)
LINUX = [example for example in EXAMPLES if "build/bzImage" in example]
BARE = [example for example in EXAMPLES if "build/bzImage" not in example]


def run(example: str) -> str:
    """Run ``example`` as a script and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, text=True, capture_output=True, check=False,
        timeout=patient(300), stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.kvm
@pytest.mark.parametrize("example", LINUX, ids=range(len(LINUX)))
def test_an_example_with_linux(example: str) -> None:
    printed = run(example)
    for promised in re.findall(r"^ *print\(.*\)  # (.*)$", example, re.MULTILINE):
        assert promised in printed.splitlines()


@pytest.mark.bare
@pytest.mark.parametrize("example", BARE, ids=range(len(BARE)))
def test_an_example_with_a_bare_guest(example: str) -> None:
    printed = run(example)
    for promised in re.findall(r"^ *print\(.*\)  # (.*)$", example, re.MULTILINE):
        assert promised in printed.splitlines()


def test_the_page_tells_of_every_name() -> None:
    words = set(re.findall(r"\w+", TEXT))
    assert [name for name in pyvmm.__all__ if name not in words and name != "__version__"] == []
