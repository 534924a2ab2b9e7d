"""Fixtures: every kind of ring, a disk in this process behind a queue of it, a back end to test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.vhost_user import VhostUserTransport
from tests.support.driver_rigs import RING_KINDS, DiskRig, RingKind, open_fds
from tests.support.live_backend import LiveBackend
from tests.support.vhost_user_queues import fds_open


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


# The vhost-user transport against a back end that a test tells what to say


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The socket of a vhost-user back end."""
    return tmp_path / "disk.sock"


@pytest.fixture
def backend(path: Path) -> Iterator[LiveBackend]:
    """A back end; the fds that are open before it are open after it, and no others."""
    before = fds_open()
    with LiveBackend(path) as backend:
        yield backend
    assert fds_open() == before


@pytest.fixture
def transport(backend: LiveBackend, path: Path) -> Iterator[VhostUserTransport]:
    """A connection to it, with little patience."""
    with VhostUserTransport(path, timeout_s=0.2) as transport:
        yield transport


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    """Room for a few queues."""
    with SharedMemory(16384) as memory:
        yield memory
