"""Our driver against qemu-storage-daemon's vhost-user-blk export: nobody's mock."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.driver.errors import DeviceBrokenError, QueueFullError, RequestError, TransportError
from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.queue import DRIVER_FEATURES
from pyvmm.driver.vhost_user import VhostUserTransport
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.driver_client import Client
from tests.support.patience import patient
from tests.support.storage_daemon import StorageDaemon

DISK_BYTES = 1 << 20
KIB = 1024
QUEUES = 4
PLAIN = DRIVER_FEATURES & ~int(Feature.INDIRECT_DESC | Feature.EVENT_IDX)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(DISK_BYTES))
    return path


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


@pytest.fixture
def daemon(image: Path, socket: Path) -> Iterator[StorageDaemon]:
    with StorageDaemon(image, socket, queues=QUEUES) as daemon:
        yield daemon


@pytest.fixture(
    params=[
        DRIVER_FEATURES,
        DRIVER_FEATURES & ~int(Feature.INDIRECT_DESC),
        DRIVER_FEATURES & ~int(Feature.EVENT_IDX),
        PLAIN,
    ],
    ids=["indirect-event_idx", "event_idx", "indirect", "plain"],
)
def client(
    daemon: StorageDaemon, socket: Path, request: pytest.FixtureRequest
) -> Iterator[Client]:
    """A driver with one queue, for each way it can be negotiated with this peer."""
    with Client(VhostUserTransport(socket), features=request.param) as client:
        yield client


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


# Requests


def test_what_it_says_of_itself(client: Client) -> None:
    assert client.transport.max_queues == QUEUES
    assert client.transport.max_mem_regions == 32
    assert client.queue.capacity_bytes == DISK_BYTES
    assert not client.queue.read_only
    identity = client.buffer(0, 20)
    client.queue.get_id(identity, "id")
    assert client.ret() == 0
    assert bytes(identity) == b"vhost_user_blk".ljust(20, b"\0")


def test_read(client: Client, image: Path) -> None:
    disk = image.read_bytes()
    for offset, length in ((0, 512), (4 * KIB, 16 * KIB), (DISK_BYTES - 512, 512)):
        assert client.read(offset, length) == disk[offset : offset + length]


def test_write_and_flush(client: Client, image: Path) -> None:
    disk = image.read_bytes()
    client.write(3 * 512, b"w" * 1536)
    client.queue.flush("flush")
    assert client.ret() == 0
    assert image.read_bytes() == disk[:1536] + b"w" * 1536 + disk[3072:]


def test_several_pieces_of_memory(client: Client, image: Path) -> None:
    """readv and writev, with pieces of any length; read_raw and write_raw by address."""
    whole = client.buffer(0, 2048)
    pieces = [whole[:100], whole[100:1500], whole[1500:]]
    client.queue.readv(8 * KIB, pieces, "readv")
    assert client.ret() == 0
    assert whole == image.read_bytes()[8 * KIB : 10 * KIB]
    client.queue.writev(64 * KIB, pieces, "writev")
    assert client.ret() == 0
    client.queue.write_raw(80 * KIB, client.memory.address + 512, 1024, "raw")
    assert client.ret() == 0
    client.queue.read_raw(64 * KIB, client.memory.address + 4096, 2048, "raw")
    assert client.ret() == 0
    for piece in pieces:
        piece.release()
    disk = image.read_bytes()
    assert disk[64 * KIB : 66 * KIB] == whole == client.memory.view[4096:6144]
    assert disk[80 * KIB : 81 * KIB] == whole[512:1536]


def test_discard(client: Client, image: Path) -> None:
    before = image.stat().st_blocks
    client.queue.discard(64 * KIB, 256 * KIB, "discard")
    assert client.ret() == 0
    assert image.stat().st_blocks == before - 512
    assert client.read(64 * KIB, 16 * KIB) == bytes(16 * KIB)


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes(client: Client, image: Path, unmap: bool) -> None:
    disk, before = image.read_bytes(), image.stat().st_blocks
    client.queue.write_zeroes(64 * KIB, 128 * KIB, "zeroes", unmap=unmap)
    assert client.ret() == 0
    assert image.read_bytes() == disk[: 64 * KIB] + bytes(128 * KIB) + disk[192 * KIB :]
    assert image.stat().st_blocks == before - (256 if unmap else 0)


def test_many_at_once_each_answered_once(client: Client, image: Path) -> None:
    """Some hundred writes and reads in batches; each context comes back once, with its data."""
    rng, disk = random.Random(2), bytearray(image.read_bytes())
    for _ in range(8):
        wanted: dict[int, bytes] = {}
        places = rng.sample(range(DISK_BYTES // 8192), 16)
        for number, place in enumerate(places):
            offset, length = place * 8192, 512 * rng.randint(1, 16)
            buffer = client.buffer(number, length)
            if number % 2:
                buffer[:] = disk[offset : offset + length] = rng.randbytes(length)
                client.queue.write(offset, buffer, number)
            else:
                wanted[number] = bytes(disk[offset : offset + length])
                client.queue.read(offset, buffer, number)
        assert client.rets(16) == dict.fromkeys(range(16), 0)
        for number, data in wanted.items():
            assert client.buffer(number, len(data)) == data
    assert image.read_bytes() == disk


# The queue


@pytest.mark.parametrize(("features", "room"), [(DRIVER_FEATURES, 64), (PLAIN, 21)])
def test_a_full_queue(
    daemon: StorageDaemon, socket: Path, image: Path, features: int, room: int
) -> None:
    """One descriptor a request with INDIRECT_DESC, three without; nothing is half-queued."""
    with Client(VhostUserTransport(socket), features=features, buffers=65) as client:
        for number in range(room):
            client.queue.read(number * 512, client.buffer(number, 512), number)
        for _ in range(2):
            with pytest.raises(QueueFullError, match="free descriptors"):
                client.queue.read(0, client.buffer(room, 512), "one too many")
        assert client.queue.in_flight == room
        assert client.rets(room) == dict.fromkeys(range(room), 0)
        disk = image.read_bytes()
        for number in range(room):
            assert client.buffer(number, 512) == disk[number * 512 :][:512]
        client.queue.read(0, client.buffer(room, 512), "now there is room")
        assert client.ret() == 0


def test_two_queues(daemon: StorageDaemon, socket: Path, image: Path) -> None:
    """Each has its own kick, its own call and its own completions."""
    disk = image.read_bytes()
    with Client(VhostUserTransport(socket), queues=2) as client:
        for number in range(8):
            client.queues[number % 2].read(number * 4096, client.buffer(number, 4096), number)
        client.notify(1)
        assert client.rets(4, index=1) == dict.fromkeys((1, 3, 5, 7), 0)
        assert client.queues[0].in_flight == 4
        assert client.rets(4, index=0) == dict.fromkeys((0, 2, 4, 6), 0)
        for number in range(8):
            assert client.buffer(number, 4096) == disk[number * 4096 :][:4096]


def test_no_more_queues_than_it_has(daemon: StorageDaemon, socket: Path) -> None:
    with pytest.raises(TransportError, match=f"5 queues; the device has {QUEUES}"):
        Client(VhostUserTransport(socket), queues=QUEUES + 1)


def test_completions_without_interrupts(client: Client) -> None:
    """``set_used_notif_enabled``: what is completed is there, but nobody is woken up for it."""
    fd = client.transport.completion_fd(0)
    client.read(0, 512)  # of the first, libvhost-user always tells
    while select.select([fd], [], [], 0.05)[0]:
        os.eventfd_read(fd)
    client.queue.set_used_notif_enabled(False)
    client.queue.read(0, client.buffer(0, 512), "quiet")
    client.notify()
    done, until_s = list(client.queue.completions()), time.monotonic() + patient(5)
    while not done and time.monotonic() < until_s:
        done = list(client.queue.completions())
    assert done == [("quiet", 0)]
    assert not select.select([fd], [], [], 0)[0]
    client.queue.set_used_notif_enabled(True)
    client.queue.read(0, client.buffer(0, 512), "loud")
    client.notify()
    assert select.select([fd], [], [], 5)[0]
    assert client.ret() == 0


# Memory


def test_memory_comes_and_goes_while_queues_run(client: Client, image: Path) -> None:
    transport, disk = client.transport, image.read_bytes()
    spare = transport.max_mem_regions - len(transport.regions)
    regions = [SharedMemory(4096) for _ in range(spare)]
    for number, region in enumerate(regions):
        transport.map_mem_region(region.address, 4096, region.fd)
        client.queue.read(number * 4096, region.view, number)
        assert client.ret() == 0
    for number, region in enumerate(regions):
        assert region.view == disk[number * 4096 :][:4096]
        transport.unmap_mem_region(region.address, 4096)
        with pytest.raises(RequestError, match="in no mapped region"):
            client.queue.read(0, region.view, "gone")
        region.close()
    assert client.read(0, 512) == disk[:512]


# The other side


def test_a_read_only_export(image: Path, socket: Path) -> None:
    with (
        StorageDaemon(image, socket, writable=False),
        Client(VhostUserTransport(socket)) as client,
    ):
        assert client.queue.read_only
        with pytest.raises(RequestError, match="read-only"):
            client.queue.write(0, client.buffer(0, 512), "no")
        assert client.read(512, 512) == image.read_bytes()[512:1024]


def test_features_it_does_not_offer_are_not_used(client: Client) -> None:
    assert not client.transport.features & Feature.RING_PACKED
    assert not client.transport.acked_features & Feature.RING_PACKED
    assert client.transport.acked_features & BlockFeature.DISCARD


def test_leaving_and_coming_back(daemon: StorageDaemon, socket: Path, image: Path) -> None:
    """Stopped in good order, the back end takes the next front end, and no descriptor is left."""
    before = open_fds()
    for number in range(3):
        with Client(VhostUserTransport(socket), queues=QUEUES) as client:
            client.write(number * 512, bytes([number]) * 512)
            client.transport.stop()
            assert image.read_bytes()[: 512 * number + 512] == b"".join(
                bytes([one]) * 512 for one in range(number + 1)
            )
    assert open_fds() == before


def test_a_back_end_that_is_killed(daemon: StorageDaemon, socket: Path) -> None:
    """One clear error, that names the socket, and every context back once."""
    before = open_fds()
    with Client(VhostUserTransport(socket), queues=2) as client:
        assert len(client.read(0, 512)) == 512
        daemon.process.send_signal(signal.SIGSTOP)
        for number in range(10):
            client.queues[number % 2].read(0, client.buffer(number, 512), number)
        client.notify(0)
        client.notify(1)
        daemon.kill()
        with pytest.raises(DeviceBrokenError, match=r"disk\.sock: .*hung up"):
            client.collect(5)
        with pytest.raises(DeviceBrokenError, match=r"disk\.sock: .*hung up"):
            client.transport.check()
        assert [queue.abandon() for queue in client.queues] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
        assert [queue.abandon() for queue in client.queues] == [[], []]
        with pytest.raises(DeviceBrokenError, match="abandoned"):
            client.queue.read(0, client.buffer(0, 512), "late")
    assert open_fds() == before


def test_a_back_end_that_does_not_answer(daemon: StorageDaemon, socket: Path) -> None:
    daemon.process.send_signal(signal.SIGSTOP)
    before_s = time.monotonic()
    with pytest.raises(TransportError, match=r"disk\.sock: .* did not come within 0\.2 s"):
        VhostUserTransport(socket, timeout_s=0.2)
    assert time.monotonic() - before_s < patient(2)
