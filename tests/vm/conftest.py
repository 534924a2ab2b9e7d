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


@pytest.fixture(autouse=True)
def own_memory(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pyvmm remembers of a kernel from one failed run is not said in another test's."""
    if request.node.get_closest_marker("power_cut") is None:  # they need the lab's, in the cache
        monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
