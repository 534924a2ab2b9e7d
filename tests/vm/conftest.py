"""What guests need: a fresh copy of our image; ``make kernel image`` builds what is copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.guest import IMAGE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A copy of build/test.img that the test may write."""
    return shutil.copyfile(IMAGE, tmp_path / "root.img")
