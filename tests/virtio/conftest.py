"""Fixtures of the virtio tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvmm.storage.backend import BlockBackend
from pyvmm.virtio.block import BlockConfig
from tests.support.general_path import without_fast_path
from tests.support.rig import RAM_BYTES, Hooked, Rig, make_rig

MakeRig = Callable[..., Rig]


class Page:
    """Which kind of register page rigs have."""

    is_mapped = False


@pytest.fixture
def page() -> Page:
    """Trapped, unless ``both_pages`` says otherwise."""
    return Page()


@pytest.fixture(params=["trapped", "mapped"])
def both_pages(request: pytest.FixtureRequest, page: Page) -> None:
    """The test runs twice: with a register page of either kind."""
    page.is_mapped = request.param == "mapped"


@pytest.fixture
def new_rig(tmp_path: Path, page: Page) -> Iterator[MakeRig]:
    """Makes rigs over one image, closed in the end."""
    with ExitStack() as stack:

        def make(
            *,
            config: BlockConfig | None = None,
            backend: BlockBackend | None = None,
            queue_size: int = 16,
            ram_bytes: int = RAM_BYTES,
            keep_used: bool | None = None,
        ) -> Rig:
            rig = make_rig(
                tmp_path / "disk.img",
                config=config,
                backend=backend,
                queue_size=queue_size,
                ram_bytes=ram_bytes,
                keep_used=page.is_mapped if keep_used is None else keep_used,
            )
            stack.callback(rig.backend.close)
            stack.callback(rig.transport.close)
            return rig

        yield make


@pytest.fixture(params=["fast", "general"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs twice: through the fast path, where it takes it, and without."""
    if request.param == "general":
        without_fast_path(monkeypatch)


@pytest.fixture
def rig(new_rig: MakeRig) -> Rig:
    """A running device with 16 entries and a disk of 64 sectors, sector i filled with i."""
    rig = new_rig()
    rig.driver.start()
    return rig


@pytest.fixture
def hooked(new_rig: MakeRig) -> tuple[Rig, Hooked]:
    """A running device over a backend whose methods a test can replace."""
    plain = new_rig()
    backend = Hooked(plain.backend)
    rig = new_rig(backend=backend)
    rig.driver.start()
    return rig, backend
