"""Scripted back ends, and what is handed to them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.vhost_user_disk import Script, scripted
from tests.support.vhost_user_peers import ScriptedBackend, open_fds


@pytest.fixture
def peer() -> Iterator[ScriptedBackend]:
    """A back end that has yet to be told what to say."""
    before = open_fds()
    with ScriptedBackend() as peer:
        yield peer
    assert open_fds() == before


@pytest.fixture
def eventfd_pair() -> Iterator[tuple[int, int]]:
    """A kick and a call."""
    fds = os.eventfd(0), os.eventfd(0)
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.fixture
def script() -> Iterator[Script]:
    """A disk of two queues."""
    with scripted() as script:
        yield script
