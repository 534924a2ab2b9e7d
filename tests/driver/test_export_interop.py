"""Our driver against ``pyvmm export``, a process of its own: both halves of virtio-blk and of
vhost-user, each the other's test."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from pyvmm.driver.errors import DeviceBrokenError, RequestError, TransportError
from pyvmm.driver.queue import DRIVER_FEATURES
from pyvmm.driver.vhost_user import VhostUserTransport
from pyvmm.virtio.spec import Feature
from tests.support.driver_client import Client
from tests.support.driver_script import (
    MOST_SECTORS,
    SECTORS,
    Ask,
    Setup,
    play,
    scripts,
    setups,
)
from tests.support.export_process import Export
from tests.support.shared_export import DISK_BYTES, SharedExport, make_image, open_fds

SPLIT = DRIVER_FEATURES & ~int(Feature.RING_PACKED)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.img")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


# Everything at once, at random


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedExport]:
    shared = SharedExport(tmp_path_factory.mktemp("shared"))
    with shared.export:
        yield shared


def check_script(shared: SharedExport, setup: Setup, script: list[list[Ask]]) -> None:
    """Play it, on a connection of its own; then compare the whole file."""
    disk = bytearray(shared.image.read_bytes())
    with Client(
        VhostUserTransport(shared.path),
        queues=setup.queues,
        size=setup.size,
        features=setup.features,
        buffer_bytes=MOST_SECTORS * 512,
    ) as client:
        assert bool(client.transport.acked_features & Feature.RING_PACKED) == setup.packed
        play(client, disk, script)
        client.transport.stop()
        assert all(not list(queue.completions()) for queue in client.queues)
    assert shared.image.read_bytes() == disk


@settings(max_examples=60, deadline=None)
@given(setup=setups, script=scripts)
def test_any_sequence_on_any_queues(
    shared: SharedExport, setup: Setup, script: list[list[Ask]]
) -> None:
    check_script(shared, setup, script)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("queues", range(1, 9))
def test_each_number_of_queues(shared: SharedExport, queues: int, packed: bool) -> None:
    """Rings that go round several times, every queue busy."""
    rng = random.Random(queues)
    script = [
        [
            Ask(
                kind=rng.choice(["read", "write", "flush", "write_zeroes"]),
                queue=number,
                sector=rng.randrange(SECTORS - MOST_SECTORS),
                sectors=rng.randint(1, MOST_SECTORS),
                fill=rng.randint(1, 255),
                cuts=[],
                unmap=False,
            )
            for number in range(8)
        ]
        for _ in range(20)
    ]
    check_script(shared, Setup(packed, queues, 8, 0), script)


# The export as a peer


@pytest.mark.parametrize("features", [SPLIT, DRIVER_FEATURES], ids=["split", "packed"])
def test_a_disk_that_fails_is_an_io_error(
    tmp_path: Path, image: Path, path: Path, features: int
) -> None:
    """``faults=`` of the export: -EIO, the request's own; what follows is served."""
    script = tmp_path / "faults"
    script.write_text("read 1: EIO\n")
    with (
        Export(f"{image},faults={script}", path),
        Client(VhostUserTransport(path), features=features) as client,
    ):
        client.queue.read(0, client.buffer(0, 512), "bad")
        client.queue.read(0, client.buffer(1, 512), "good")
        assert client.rets(2) == {"bad": -errno.EIO, "good": 0}


def test_the_serial_number(image: Path, path: Path) -> None:
    with Export(f"{image},serial=disk-7", path), Client(VhostUserTransport(path)) as client:
        identity = client.buffer(0, 20)
        client.queue.get_id(identity, "id")
        assert client.ret() == 0
        assert bytes(identity) == b"disk-7".ljust(20, b"\0")


def test_a_read_only_export_serves_many(image: Path, path: Path) -> None:
    with (
        Export(f"{image},ro", path),
        Client(VhostUserTransport(path)) as one,
        Client(VhostUserTransport(path)) as other,
    ):
        with pytest.raises(RequestError, match="read-only"):
            one.queue.write(0, one.buffer(0, 512), "no")
        assert one.read(0, 4096) == other.read(0, 4096) == image.read_bytes()[:4096]


def test_a_rate_limit_is_the_disks_not_a_connections(image: Path, path: Path) -> None:
    """A front end that reconnects gets no fresh burst."""
    with Export(f"{image},iops=20:4", path):
        begun_s = time.monotonic()
        for _ in range(3):
            with Client(VhostUserTransport(path)) as client:
                for number in range(4):
                    client.queue.read(0, client.buffer(number, 512), number)
                client.collect(4)
        assert time.monotonic() - begun_s > 0.35


def test_a_disk_that_can_be_written_serves_one_at_a_time(image: Path, path: Path) -> None:
    with Export(image, path) as export:
        with Client(VhostUserTransport(path)) as client:
            with pytest.raises(TransportError, match=r"disk\.sock: .*hung up"):
                VhostUserTransport(path)
            export.wait_for("is turned away")
            client.write(0, b"w" * 512)
        with Client(VhostUserTransport(path)) as client:  # at once
            assert client.read(0, 512) == b"w" * 512


def test_a_disk_that_grows(image: Path, path: Path) -> None:
    with Export(image, path) as export, Client(VhostUserTransport(path)) as client:
        assert not client.queue.refresh_capacity()
        with pytest.raises(RequestError, match="not on the disk"):
            client.queue.read(DISK_BYTES, client.buffer(0, 512), "too far")
        os.truncate(image, 2 * DISK_BYTES)
        export.process.send_signal(signal.SIGUSR1)
        export.wait_for("bytes now")
        assert client.queue.refresh_capacity()
        assert client.queue.capacity_bytes == 2 * DISK_BYTES
        assert client.read(2 * DISK_BYTES - 512, 512) == bytes(512)
        client.transport.check()


@pytest.mark.parametrize("features", [SPLIT, DRIVER_FEATURES], ids=["split", "packed"])
def test_a_stop_in_the_middle_loses_nothing(image: Path, path: Path, features: int) -> None:
    """Of requests that a rate limit holds back some are done at the stop, and the rest are not
    begun: each context comes back once, and only what was answered was written."""
    with (
        Export(f"{image},iops=50:4", path),
        Client(VhostUserTransport(path), features=features) as client,
    ):
        before = image.read_bytes()
        for number in range(32):
            buffer = client.buffer(number, 512)
            buffer[:] = b"w" * 512
            client.queue.write(number * 512, buffer, number)
        client.notify()
        assert select.select([client.transport.completion_fd(0)], [], [], 5)[0]
        client.transport.stop()
        done = [one.context for one in client.queue.completions()]
        lost = client.queue.abandon()
        assert done + lost == list(range(32))
        assert 0 < len(done) < 32
        assert image.read_bytes() == b"w" * 512 * len(done) + before[512 * len(done) :]


def test_an_export_that_is_killed_and_started_again(image: Path, path: Path) -> None:
    """One clear error that names the socket, every context back once; then a new connection."""
    before = open_fds()
    with Export(image, path) as export:
        with Client(VhostUserTransport(path), queues=1) as client:
            client.write(0, b"w" * 512)
            export.process.send_signal(signal.SIGSTOP)
            for number in range(10):
                client.queue.read(0, client.buffer(number, 512), number)
            client.notify()
            export.kill()
            for _ in range(2):
                with pytest.raises(DeviceBrokenError, match=r"disk\.sock: .*hung up"):
                    client.collect(10)
            assert client.queue.abandon() == list(range(10))
            assert client.queue.abandon() == []
        assert path.is_socket()
        with pytest.raises(TransportError, match=r"disk\.sock: .*Connection refused"):
            VhostUserTransport(path)
    with Export(image, path), Client(VhostUserTransport(path)) as client:
        assert client.read(0, 512) == b"w" * 512
    assert open_fds() == before
