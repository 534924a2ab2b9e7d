"""A host whose apt is made of scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import fake_apt


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scripts' directory; touch ``known``, ``fresh`` and ``offline`` in it."""
    directory = tmp_path / "tools"
    fake_apt.install(directory, monkeypatch)
    return directory
