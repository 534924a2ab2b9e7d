"""Fixtures of the storage tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvmm.storage.raw import RawBackend
from tests.support.raw_disks import opened
from tests.support.rig import Rig, make_rig


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file of 64 sectors; sector i is filled with i."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([i]) * 512 for i in range(64)))
    return path


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of files without a name, for this test alone."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A file of 64 blocks of 4 KiB; block i is filled with i."""
    path = tmp_path / "base.img"
    path.write_bytes(b"".join(bytes([n]) * 4096 for n in range(64)))
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def backend(image: Path) -> Iterator[RawBackend]:
    with opened(image) as backend:
        yield backend


@pytest.fixture
def rig(image: Path) -> Iterator[Rig]:
    """The guest's view of the image: a device in front of a RawBackend, running."""
    rig = make_rig(image)
    rig.driver.start()
    yield rig
    rig.transport.close()
    rig.backend.close()
