"""The fast path: what it serves itself, what it merges, and what it leaves to the general path.

That both do the same is test_fast_path_equal.py's to show.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.block.fast.path import FastPath
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.packed_driver import PackedDriver
from tests.support.rig import DISK_SECTORS, Hooked, Rig
from tests.support.scratched_disk import ScratchedDisk
from tests.support.virtio_driver import RAM_BASE, BlockDriver, readable, writable
from tests.virtio.conftest import MakeRig

IN, OUT, FLUSH = 0, 1, 4
OK, IOERR = 0, 1
SIZE = 64
FEATURES = int(
    Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX | BlockFeature.FLUSH
)
KINDS = ["split", "packed"]


class Disk:
    """A driver of one kind of ring over a disk that counts its transfers."""

    def __init__(self, rig: Rig, kind: str, features: int = FEATURES) -> None:
        self.rig = rig
        assert isinstance(rig.backend, ScratchedDisk)
        self.backend = rig.backend
        self.driver = BlockDriver(rig.transport, rig.memory, size=SIZE)
        if kind == "packed":
            self.driver = PackedDriver(rig.transport, rig.memory, size=SIZE)
            features |= Feature.RING_PACKED
        self.driver.start(features)
        self._placed: list[tuple[int, int, int]] = []
        self._head = 0

    def place(
        self,
        request_type: int,
        sector: int,
        pieces: Sequence[int] = (512,),
        *,
        fill: int = 0,
        data: int | None = None,
        indirect: bool = True,
    ) -> None:
        """Offer a request with data in ``pieces`` (at GPA ``data``, if it matters); what is
        written is ``fill``."""
        driver = self.driver
        status = driver.status_byte()
        if data is None:
            data = driver.alloc(sum(pieces))
        driver.memory.write(data, bytes([fill]) * sum(pieces))
        buffer = writable if request_type == IN else readable
        chain = [readable(driver.header(request_type, sector), 16)]
        at = data
        for length in pieces:
            chain.append(buffer(at, length))
            at += length
        chain.append(writable(status, 1))
        chain = [driver.indirect(chain)] if indirect else chain
        driver.place(chain, self._head)
        self._head += len(chain)
        self._placed.append((status, data, sum(pieces)))

    def serve(self) -> int:
        """Notify and have everything served; the number of transfers that took."""
        before = self.backend.calls
        self.driver.notify()
        assert len(self.driver.reap()) == len(self._placed)
        return self.backend.calls - before

    def content(self, first: int, end: int) -> bytes:
        """The sectors from ``first`` to ``end`` as they are in the file."""
        return Path(self.backend.path).read_bytes()[first * 512 : end * 512]

    def answers(self) -> list[tuple[int, bytes]]:
        """Status and data of every request."""
        read = self.driver.memory.read
        return [(read(status, 1)[0], read(data, n)) for status, data, n in self._placed]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Split or packed."""
    return str(request.param)


@pytest.fixture
def scratched(new_rig: MakeRig, tmp_path: Path) -> Rig:
    """A rig over a disk whose sectors can be made bad; sector i is filled with i."""
    path = tmp_path / "scratched.img"
    path.write_bytes(b"".join(bytes([i]) * 512 for i in range(DISK_SECTORS)))
    return new_rig(backend=ScratchedDisk(path), queue_size=SIZE)


@pytest.fixture
def disk(scratched: Rig, kind: str) -> Disk:
    """The same with a running driver."""
    return Disk(scratched, kind)


@pytest.mark.parametrize(
    ("pieces", "indirect"),
    [
        ((512,), False),
        ((512,), True),
        ((512, 1024), True),
        ((1, 511), True),
        ((4096,) * 3, True),
        ((8,) * (SIZE - 3) + (24,), True),
    ],
)
def test_reads_and_writes_need_no_general_path(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, ...], indirect: bool
) -> None:
    monkeypatch.setattr(BlockDevice, "_serve", None)
    disk.place(OUT, 8, pieces, fill=0xAB, indirect=indirect)
    disk.place(IN, 8, pieces, indirect=indirect)
    disk.serve()
    assert disk.answers() == [(OK, b"\xab" * sum(pieces))] * 2


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_request_alone_needs_no_batch(
    scratched: Rig, kind: str, monkeypatch: pytest.MonkeyPatch, event_idx: bool
) -> None:
    disk = Disk(scratched, kind, FEATURES if event_idx else FEATURES & ~Feature.EVENT_IDX)
    monkeypatch.setattr(FastPath, "_serve_waiting", None)
    driver = disk.driver
    for number in range(2 * SIZE + 3):  # over the ring's end, in both laps
        sector = number % DISK_SECTORS
        data = bytes([number % 251]) * 512
        assert driver.request(OUT, sector, data=data, indirect=True) == (OK, 1, b"")
        assert driver.request(FLUSH, indirect=True) == (OK, 1, b"")
        assert driver.request(IN, sector, room=512, indirect=True) == (OK, 513, data)


@pytest.mark.parametrize("requests", [1, 2])
def test_a_read_only_disk_is_not_written_though_its_file_could_be(
    new_rig: MakeRig, tmp_path: Path, kind: str, requests: int
) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(DISK_SECTORS * 512))
    config = BlockConfig(read_only=True, queue_size=SIZE)
    disk = Disk(new_rig(config=config, backend=ScratchedDisk(path)), kind)
    for sector in range(requests):
        disk.place(OUT, sector, fill=1)
    assert disk.serve() == 0
    assert [status for status, _ in disk.answers()] == [IOERR] * requests
    assert disk.content(0, DISK_SECTORS) == bytes(DISK_SECTORS * 512)


def test_a_flush_alone_that_fails_says_so(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(disk.backend, "flush", fail)
    assert disk.driver.request(FLUSH, indirect=True) == (IOERR, 1, b"")


@pytest.mark.parametrize("pieces", [(512,), (200, 312)])
def test_status_is_the_last_byte_of_a_larger_buffer(disk: Disk, pieces: tuple[int, ...]) -> None:
    driver = disk.driver
    data = driver.alloc(1024 + 1)
    chain, at = [readable(driver.header(IN, 5), 16)], data
    for length in (*pieces, 512 + 1):
        chain.append(writable(at, length))
        at += length
    answer = driver.ask([driver.indirect(chain)], data + 1024, data, 1024)
    assert answer == (OK, 1025, b"\5" * 512 + b"\6" * 512)


# Merging


@pytest.mark.parametrize("pieces", [(512,), (200, 312)])
@pytest.mark.parametrize("request_type", [IN, OUT])
def test_neighbours_are_one_transfer(
    disk: Disk, request_type: int, pieces: tuple[int, ...]
) -> None:
    for sector in range(10, 20):
        disk.place(request_type, sector, pieces, fill=100 + sector)
    assert disk.serve() == 1
    shift = 100 if request_type == OUT else 0
    assert disk.answers() == [(OK, bytes([s + shift]) * 512) for s in range(10, 20)]
    assert disk.content(10, 20) == b"".join(bytes([s + shift]) * 512 for s in range(10, 20))


@pytest.mark.parametrize(
    ("requests", "transfers"),
    [
        ([(IN, 1), (IN, 3)], 2),
        ([(IN, 2), (IN, 1)], 2),  # backwards
        ([(IN, 1), (IN, 1)], 2),
        ([(IN, 1), (OUT, 2), (IN, 3)], 3),
        ([(IN, 1), (IN, 2), (OUT, 3), (OUT, 4)], 2),
        ([(IN, 1), (FLUSH, 0), (IN, 2)], 2),
        ([(IN, 62), (IN, 63), (IN, 64)], 1),  # the last is not on the disk
    ],
)
def test_only_neighbours_of_a_kind_are_merged(
    disk: Disk, requests: list[tuple[int, int]], transfers: int
) -> None:
    for request_type, sector in requests:
        disk.place(request_type, sector)
    assert disk.serve() == transfers


def test_a_transfer_has_no_more_buffers_than_the_host_takes(disk: Disk) -> None:
    for sector in range(40):
        disk.place(IN, sector, (16,) * 32)
    limit = os.sysconf("SC_IOV_MAX")
    assert disk.serve() == -(-40 * 32 // limit)
    assert disk.answers() == [(OK, bytes([sector]) * 512) for sector in range(40)]


@pytest.mark.parametrize("request_type", [IN, OUT])
def test_each_of_a_failed_transfer_gets_its_own_status(disk: Disk, request_type: int) -> None:
    disk.backend.bad = frozenset({12, 15})
    for sector in range(10, 18):
        disk.place(request_type, sector, fill=0xEE)
    assert disk.serve() == 1 + 8
    bad = [sector in (12, 15) for sector in range(10, 18)]
    assert [status for status, _ in disk.answers()] == [IOERR if b else OK for b in bad]
    if request_type == OUT:
        kept = [bytes([s if b else 0xEE]) * 512 for s, b in zip(range(10, 18), bad, strict=True)]
        assert disk.content(10, 18) == b"".join(kept)


def test_a_failure_alone_is_not_tried_again(disk: Disk) -> None:
    disk.backend.bad = frozenset({12})
    disk.place(IN, 12)
    assert disk.serve() == 1
    assert disk.answers()[0][0] == IOERR


def test_durable_writes_are_not_merged(scratched: Rig, kind: str) -> None:
    disk = Disk(scratched, kind, FEATURES & ~int(BlockFeature.FLUSH))
    for sector in range(4):
        disk.place(OUT, sector)
    for sector in range(4, 8):
        disk.place(IN, sector)
    assert disk.serve() == 4 + 1
    assert disk.backend.writes == dict.fromkeys(range(4), True)


def test_backends_that_are_no_file_get_every_request_for_itself(scratched: Rig, kind: str) -> None:
    hooked = Hooked(scratched.backend)
    device = BlockDevice(BlockConfig(queue_size=SIZE), hooked)
    transport = MmioTransport(device, scratched.memory, lambda: None, report=print)
    disk = Disk(dataclasses.replace(scratched, transport=transport), kind)
    for sector in range(4):
        disk.place(IN, sector)
    assert disk.serve() == 4
    transport.close()


# Memory in several regions

FAR = RAM_BASE + (1 << 30)


def test_data_in_another_region_needs_no_general_path(
    scratched: Rig, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratched.memory.add(FAR, bytearray(0x4000))
    disk = Disk(scratched, kind)
    monkeypatch.setattr(BlockDevice, "_serve", None)
    disk.place(IN, 5, data=FAR)
    disk.place(IN, 6, (1, 511), data=FAR + 0x1000)
    disk.place(IN, 7)
    assert disk.serve() == 1
    assert disk.answers() == [(OK, bytes([sector]) * 512) for sector in (5, 6, 7)]


@pytest.mark.parametrize("far", ["header", "status", "table"])
def test_what_else_is_in_another_region_is_served(scratched: Rig, kind: str, far: str) -> None:
    scratched.memory.add(FAR, bytearray(0x4000))
    disk = Disk(scratched, kind)
    driver = disk.driver
    near = {"header": driver.header(IN, 9), "status": driver.status_byte(), "table": 0}
    data = driver.alloc(512)
    place = {**near, far: FAR}
    driver.memory.write(place["header"], driver.memory.read(near["header"], 16))
    chain = [readable(place["header"], 16), writable(data, 512), writable(place["status"], 1)]
    table = driver.indirect(chain)
    if far == "table":
        driver.memory.write(FAR, driver.memory.read(table.gpa, table.length))
        table = table._replace(gpa=FAR)
    answer = driver.ask([table], place["status"], data, 512)
    assert answer == (OK, 513, bytes([9]) * 512)


def test_data_across_the_border_of_two_regions_is_refused(scratched: Rig, kind: str) -> None:
    end = scratched.memory.regions[0].end
    scratched.memory.add(end, bytearray(0x1000))
    driver = Disk(scratched, kind).driver
    status = driver.status_byte()
    chain = [readable(driver.header(IN, 5), 16), writable(end - 256, 512), writable(status, 1)]
    assert driver.ask([driver.indirect(chain)], status) == (IOERR, 1, b"")
