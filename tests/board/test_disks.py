"""A machine's disks, frozen and taken back between the guest's own requests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from pyvmm.board.board import Board
from pyvmm.board.disks import check_disks, freeze_disks, plug_disks, revert_disks
from pyvmm.config import DiskConfig, RunConfig
from pyvmm.errors import SnapshotError
from pyvmm.memory import GuestMemory
from pyvmm.run.runner import Runner
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.storage.open import DiskSource
from pyvmm.virtio.block import BlockDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BlockRequestType, Register
from tests.support.rig import Hooked
from tests.support.virtio_driver import BlockDriver

RAM_BYTES = 8 << 20
SIZE = 1 << 20
IN, OUT, FLUSH = BlockRequestType.IN, BlockRequestType.OUT, BlockRequestType.FLUSH
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "durable": {"writeback": False},
    "limited": {"rate_limit": RateLimit(ops_per_s=10**6)},
    "queues": {"queues": 2},
}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(b"".join(bytes([n % 251]) * 512 for n in range(SIZE // 512)))
    return path


class Guest:
    """A board with ``disks``, and a driver for every queue of each."""

    def __init__(self, stack: contextlib.ExitStack, disks: Sequence[DiskConfig]) -> None:
        self.memory = stack.enter_context(GuestMemory([(0, RAM_BYTES)]))
        self.board = Board(self.memory, stack, maps_pages=True, report=pytest.fail)
        config = RunConfig(kernel="vmlinux", disks=tuple(disks), serve="exit")
        plug_disks(self.board, config, cast(Runner, None), stack, pytest.fail)
        self.drivers: list[list[BlockDriver]] = []

    def start(self) -> None:
        bottom = 1 << 20
        for slot in self.board.slots:
            queues = len(slot.device.queues)
            drivers = []
            for index in range(queues):
                drivers.append(BlockDriver(
                    slot.transport, self.memory, index=index, bottom=bottom
                ))
                bottom += 256 << 10
            assert drivers[0].negotiate()
            for driver in drivers:
                driver.setup_queue()
            drivers[0].set(Register.STATUS, 15)
            self.drivers.append(drivers)

    def write(self, sector: int, data: bytes, disk: int = 0, queue: int = 0) -> int:
        return self.drivers[disk][queue].request(OUT, sector, data=data).status

    def read(self, sector: int, length: int = 512, disk: int = 0, queue: int = 0) -> bytes:
        answer = self.drivers[disk][queue].request(IN, sector, room=length)
        assert answer.status == 0
        return answer.data


def started(stack: contextlib.ExitStack, *disks: DiskConfig) -> Guest:
    guest = Guest(stack, disks)
    guest.start()
    return guest


def closing_all(stack: contextlib.ExitStack, frozen: list[FrozenDisk]) -> list[FrozenDisk]:
    for disk in frozen:
        stack.callback(disk.close)
    return frozen


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_guest_finds_its_disks_as_they_were(
    stack: contextlib.ExitStack, base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    other = tmp_path / "ro.img"
    other.write_bytes(b"r" * SIZE)
    guest = started(
        stack,
        DiskConfig(source=DiskSource(location=str(base), snapshot=True), **options),
        DiskConfig(source=DiskSource(location=str(other), read_only=True), **options),
    )
    last = options.get("queues", 1) - 1
    before = guest.read(0, 4096)
    assert guest.write(2, b"a" * 1024) == 0
    check_disks(guest.board, into_directory=True)
    frozen = closing_all(stack, freeze_disks(guest.board))
    clone = started(stack, *(
        DiskConfig(source=disk.as_source(), **options) for disk in frozen
    ))
    for number in range(3):
        assert guest.read(0, 4096, queue=last) == before[:1024] + b"a" * 1024 + before[2048:]
        assert guest.write(number, b"g" * 1024, queue=last) == 0
        assert guest.drivers[0][0].request(FLUSH).status == 0
        assert guest.read(number, 1024) == b"g" * 1024
        assert clone.read(0, 4096) == before[:1024] + b"a" * 1024 + before[2048:]
        assert guest.read(7, disk=1) == clone.read(7, disk=1) == b"r" * 512
        assert guest.write(7, b"x" * 512, disk=1) == clone.write(7, b"x" * 512, disk=1) == 1
        revert_disks(guest.board, frozen)
    assert clone.write(0, b"c" * 512, queue=last) == 0
    assert guest.read(0) == before[:512]
    again = closing_all(stack, freeze_disks(clone.board))
    other_clone = started(stack, *(DiskConfig(source=disk.as_source()) for disk in again))
    assert other_clone.read(0) == b"c" * 512


def test_what_is_put_before_a_disk_stays_there(stack: contextlib.ExitStack, base: Path) -> None:
    guest = Guest(stack, [DiskConfig(source=DiskSource(location=str(base), snapshot=True))])
    device = guest.board.slots[0].device
    assert isinstance(device, BlockDevice)
    device.put_before_backend(Hooked)
    guest.start()
    frozen = closing_all(stack, freeze_disks(guest.board))
    assert guest.write(0, b"w" * 512) == 0
    revert_disks(guest.board, frozen)
    assert guest.read(0) == bytes(512)
    assert guest.write(0, b"w" * 512) == 0


def test_one_disk_that_cannot_be_frozen_refuses_all(
    stack: contextlib.ExitStack, base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "written.img"
    other.write_bytes(bytes(SIZE))
    guest = started(
        stack, DiskConfig(source=DiskSource(location=str(base), snapshot=True)),
        DiskConfig(source=DiskSource(location=str(other))),
    )
    for call in (lambda: check_disks(guest.board, into_directory=False),
                 lambda: freeze_disks(guest.board)):
        with pytest.raises(SnapshotError, match="is written in place") as caught:
            call()
        assert caught.value.subject == str(other)
    assert guest.write(0, b"w" * 512) == 0


def test_a_disk_that_another_process_serves_is_refused(stack: contextlib.ExitStack) -> None:
    class Served(EntropyDevice):
        is_served_elsewhere = True

    guest = Guest(stack, [])
    guest.board.plug(Served(), "virtio0", at_exit=True)
    with pytest.raises(SnapshotError, match="virtio0: is a disk that another process serves"):
        check_disks(guest.board, into_directory=False)


def test_overlay_files_are_saved_and_not_rewound(
    stack: contextlib.ExitStack, base: Path, tmp_path: Path
) -> None:
    source = DiskSource(location=str(base), snapshot=True, overlay=str(tmp_path / "o"))
    guest = started(stack, DiskConfig(source=source))
    assert guest.write(0, b"w" * 512) == 0
    check_disks(guest.board, into_directory=True)
    frozen = closing_all(stack, freeze_disks(guest.board))
    assert guest.write(0, b"x" * 512) == 0
    clone = started(stack, DiskConfig(source=frozen[0].as_source()))
    assert clone.read(0) == b"w" * 512
    with pytest.raises(SnapshotError, match="has overlay=FILE"):
        check_disks(guest.board, into_directory=False, to_rewind=True)
    with pytest.raises(SnapshotError, match="has overlay=FILE"):
        revert_disks(guest.board, frozen)
    assert guest.read(0) == b"x" * 512
