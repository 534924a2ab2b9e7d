"""Our driver takes an export at its word: as many pieces of memory as a request may have, each in
a page of its own, in rings of any size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.driver import InProcessTransport, RequestError, Transport, VhostUserTransport
from pyvmm.driver.queue import DRIVER_FEATURES
from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.spec import Feature
from tests.support.driver_client import Client
from tests.support.export_process import Export
from tests.support.guest import sparse

SIZES = [4, 16, 128, 256, 1024]
PAGE = 4096


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An export of 16 MiB."""
    folder = tmp_path_factory.mktemp("advice")
    with Export(sparse(folder / "disk.img", 16), folder / "socket"):
        yield folder / "socket"


def transport_of(kind: str, socket: Path) -> tuple[Transport, int]:
    """A disk, and the most segments it takes."""
    if kind == "vhost-user":
        return VhostUserTransport(socket), 126
    config = BlockConfig(queue_size=1024)
    return InProcessTransport(BlockDevice(config, MemoryBackend(bytearray(16 << 20)))), 1022


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("without", [0, Feature.INDIRECT_DESC], ids=["indirect", "direct"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("kind", ["in process", "vhost-user"])
def test_fault_12_our_driver_reads_into_pages_that_are_apart(
    socket: Path, kind: str, packed: bool, without: int, size: int
) -> None:
    features = DRIVER_FEATURES & ~int(without)
    features &= ~(0 if packed else int(Feature.RING_PACKED))
    transport, most = transport_of(kind, socket)
    # "A driver MUST NOT create a descriptor chain longer than the Queue Size of the device"
    # (2.7.5.3.1): ours does not, though this device would serve it.
    count = min(most, size - 2)
    data = random.Random(size).randbytes(count * 512)
    with Client(
        transport, size=size, features=features, buffers=2 * count + 2, buffer_bytes=PAGE
    ) as client:
        pages = [client.buffer(2 * n, 512) for n in range(count + 1)]
        for number, page in enumerate(pages[:count]):
            page[:] = data[512 * number :][:512]
        client.queue.writev(8192, pages[:count], "write")
        assert client.ret() == 0
        assert client.read(8192, 512) == data[:512]
        for page in pages:
            page[:] = bytes(512)
        client.queue.readv(8192, pages[count - 1 :: -1], "read")
        assert client.ret() == 0
        assert b"".join(pages[count - 1 :: -1]) == data
        with pytest.raises(RequestError, match=f"more than {count} segments"):
            client.queue.readv(8192, pages, "one more")
