"""Hooks on the requests of a disk: no KVM needed."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from pyvmm.api.hook_calls import REFUSE
from pyvmm.api.hooked_disk import DiskRequest
from pyvmm.api.hooks import Hooks
from pyvmm.board.board import Board
from pyvmm.board.slot import Slot
from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import VcpuLoop
from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.spec import BlockRequestType
from tests.support.virtio_driver import RAM_BASE, BlockDriver, readable, writable

SECTOR = 512
SEGMENT = struct.Struct("<QII")
IN, OUT, FLUSH, DISCARD, WRITE_ZEROES = (
    int(kind) for kind in (
        BlockRequestType.IN, BlockRequestType.OUT, BlockRequestType.FLUSH,
        BlockRequestType.DISCARD, BlockRequestType.WRITE_ZEROES,
    )
)  # fmt: skip
OK, IOERR = 0, 1


class MergingBackend(MemoryBackend):
    """A disk in memory that would be served merged requests, as a file is."""

    merges = True


@dataclass
class Machine:
    """Two disks, and nothing to run."""

    board: Board
    runner: Runner
    disks: list[bytearray]
    slots: list[Slot]
    loops: list[VcpuLoop] = field(default_factory=list)

    def driver(self, index: int = 0) -> BlockDriver:
        driver = BlockDriver(self.slots[index].transport, self.board.memory)
        driver.start()
        return driver

    def end(self) -> Outcome:
        """How the run ends, if something has ended it."""
        return self.runner.run(
            vcpus=(), workers=(), console=Console(None, None),
            output=OutputBuffer(None, self.runner.wake, lambda data: None),
        )


@pytest.fixture
def machine() -> Iterator[Machine]:
    with contextlib.ExitStack() as stack:
        memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
        runner = stack.enter_context(contextlib.closing(Runner(print)))
        board = Board(memory, stack, maps_pages=False, report=print)
        disks = [bytearray(os.urandom(64 * SECTOR)) for _ in range(2)]
        slots = []
        for index, data in enumerate(disks):
            device = BlockDevice(BlockConfig(), MergingBackend(data))
            slots.append(board.plug(device, f"virtio{index}", at_exit=True))
            board.plug(EntropyDevice(), f"entropy{index}", at_exit=True)
        yield Machine(board, runner, disks, slots)


def test_a_hook_watches_every_kind_of_request(machine: Machine) -> None:
    seen: list[DiskRequest] = []
    Hooks(machine).on_request(0, seen.append)
    driver = machine.driver()
    before = bytes(machine.disks[0][SECTOR : 3 * SECTOR])
    data = os.urandom(SECTOR)
    assert driver.request(IN, 1, room=2 * SECTOR).data == before
    assert driver.request(OUT, 2, data=data).status == OK
    assert driver.request(FLUSH).status == OK
    assert driver.request(DISCARD, data=SEGMENT.pack(4, 2, 0)).status == OK
    assert driver.request(WRITE_ZEROES, data=SEGMENT.pack(8, 1, 0)).status == OK
    assert seen == [
        DiskRequest(operation="read", offset=SECTOR, length=2 * SECTOR),
        DiskRequest(operation="write", offset=2 * SECTOR, length=SECTOR, data=data),
        DiskRequest(operation="flush"),
        DiskRequest(operation="discard", offset=4 * SECTOR, length=2 * SECTOR),
        DiskRequest(operation="write zeroes", offset=8 * SECTOR, length=SECTOR),
    ]
    assert machine.disks[0][2 * SECTOR : 3 * SECTOR] == data
    assert machine.disks[0][8 * SECTOR : 9 * SECTOR] == bytes(SECTOR)


def test_bytes_answer_a_read_and_replace_a_write(machine: Machine) -> None:
    fixed = bytes(range(256)) * 2
    Hooks(machine).on_request("virtio1", lambda request: fixed)
    driver = machine.driver(1)
    assert driver.request(IN, 1, room=SECTOR).data == fixed
    assert driver.request(OUT, 2, data=bytes(SECTOR)).status == OK
    assert machine.disks[1][2 * SECTOR : 3 * SECTOR] == fixed


def no_disk(request: DiskRequest) -> None:
    raise OSError(5, "broken")


@pytest.mark.parametrize("hook", [no_disk, lambda request: REFUSE])
def test_a_refused_request_is_an_io_error_and_the_run_goes_on(
    machine: Machine, hook: Callable[[DiskRequest], None]
) -> None:
    Hooks(machine).on_request(0, hook)
    driver, before = machine.driver(), bytes(machine.disks[0])
    for answer in (
        driver.request(IN, 1, room=SECTOR), driver.request(OUT, 1, data=bytes(SECTOR)),
        driver.request(FLUSH), driver.request(DISCARD, data=SEGMENT.pack(4, 2, 0)),
        driver.request(WRITE_ZEROES, data=SEGMENT.pack(8, 1, 0)),
    ):
        assert answer.status == IOERR
    assert machine.disks[0] == before
    assert machine.driver(1).request(IN, 1, room=SECTOR).status == OK
    machine.runner.finish(Outcome(Kind.RESET))
    assert machine.end() == Outcome(Kind.RESET)


def test_neighbours_are_no_longer_merged(machine: Machine) -> None:
    offsets: list[int] = []
    Hooks(machine).on_request(0, lambda request: offsets.append(request.offset))
    driver = machine.driver()
    for index in range(4):
        chain = [
            readable(driver.header(IN, index), 16), writable(driver.alloc(SECTOR), SECTOR),
            writable(driver.status_byte(), 1),
        ]
        driver.place(chain, head=3 * index)
    driver.notify()
    assert len(driver.reap()) == 4
    assert offsets == [0, SECTOR, 2 * SECTOR, 3 * SECTOR]


def test_several_hooks_are_asked_in_order(machine: Machine) -> None:
    asked: list[str] = []
    hooks = Hooks(machine)

    def answer(request: DiskRequest) -> bytes:
        asked.append("second")
        return bytes(SECTOR)

    hooks.on_request(0, lambda request: asked.append("first"))
    hooks.on_request("virtio0", answer)
    hooks.on_request(0, lambda request: asked.append("third"))
    assert machine.driver().request(IN, 1, room=SECTOR).data == bytes(SECTOR)
    assert asked == ["first", "second"]


@pytest.mark.parametrize(("answer", "told"), [
    (b"short", "returned 5 bytes; for this read it may return None, 512 bytes, or REFUSE, or "
     "raise OSError"),
    (7, "returned a int"),
])
def test_a_wrong_answer_ends_the_run(machine: Machine, answer: bytes, told: str) -> None:
    Hooks(machine).on_request(0, lambda request: answer)
    assert machine.driver().request(IN, 1, room=SECTOR).status == IOERR
    outcome = machine.end()
    assert outcome.kind is Kind.HOST_ERROR
    assert told in outcome.detail
    assert "on_request hook" in outcome.detail


def test_a_hook_that_raises_ends_the_run(machine: Machine) -> None:
    def hook(request: DiskRequest) -> None:
        raise KeyError(request.operation)

    Hooks(machine).on_request(0, hook)
    driver = machine.driver()
    assert driver.request(FLUSH).status == IOERR
    assert driver.request(IN, 1, room=SECTOR).status == IOERR
    outcome = machine.end()
    assert outcome.kind is Kind.HOST_ERROR
    assert "raised KeyError: 'flush'" in outcome.detail


@pytest.mark.parametrize(("disk", "error", "problem"), [
    (2, ValueError, r"no disk 2; there are: 0 \(virtio0\), 1 \(virtio1\)"),
    (-1, ValueError, "no disk -1"),
    ("entropy0", ValueError, "no disk 'entropy0'"),
    (False, TypeError, "index or name, not bool"),
    (None, TypeError, "index or name, not NoneType"),
])
def test_disks_that_are_not_there(
    machine: Machine, disk: int, error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        Hooks(machine).on_request(disk, lambda request: None)


def test_a_disk_that_is_served_elsewhere_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.slots[1].device, "is_served_elsewhere", True, raising=False)
    with pytest.raises(ConfigError, match=r"on_request\(1\): another process serves this disk"):
        Hooks(machine).on_request(1, lambda request: None)


def test_a_disk_that_has_started_keeps_its_backend(machine: Machine) -> None:
    machine.driver()
    device = machine.slots[0].device
    assert isinstance(device, BlockDevice)
    with pytest.raises(RuntimeError, match="has started this disk already"):
        device.put_before_backend(lambda backend: backend)
