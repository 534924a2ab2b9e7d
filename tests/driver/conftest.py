"""Fixtures: every kind of ring, and a disk in this process behind a queue of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.driver_rigs import RING_KINDS, DiskRig, RingKind, open_fds


@pytest.fixture(params=RING_KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> RingKind:
    """Every kind of ring."""
    kind: RingKind = request.param
    return kind


@pytest.fixture
def rig(kind: RingKind) -> Iterator[DiskRig]:
    """A disk with one queue of 16 entries; whatever a test does, no fd is left."""
    before = open_fds()
    with DiskRig(kind) as rig:
        yield rig
    assert open_fds() == before
