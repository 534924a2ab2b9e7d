"""The console device: output in order and whole, input when there is some, nothing unbounded."""

from __future__ import annotations

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.virtio.console import MAX_CHAIN_BYTES, MAX_TYPED_BYTES, ConsoleDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import ConsoleFeature, InterruptBit, Register
from tests.support.virtio_driver import (
    RAM_BASE,
    Descriptor,
    Used,
    VirtioDriver,
    readable,
    writable,
)

RECEIVE, TRANSMIT = 0, 1


class ConsoleRig:
    """A console behind a transport, and a driver for each of its queues."""

    def __init__(self) -> None:
        self.shown = bytearray()
        self.writes = 0
        self.deferred: list[int] = []
        self.rooms: list[int] = []
        self.readies: list[int] = []
        self.irqs: list[int] = []
        self.memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
        self.device = ConsoleDevice(
            self.show, lambda: self.rooms.append(1), size=(80, 24),
            on_ready=lambda: self.readies.append(1),
        )
        self.transport = MmioTransport(
            self.device, self.memory, lambda: self.irqs.append(1), report=print,
            defer=self.deferred.append,
        )
        self.rx, self.tx = (
            VirtioDriver(self.transport, self.memory, index=i) for i in (RECEIVE, TRANSMIT)
        )

    def show(self, data: bytes) -> None:
        self.writes += 1
        self.shown += data

    def start(self) -> None:
        assert self.rx.negotiate()
        tx = self.tx
        tx._top = RAM_BASE + (1 << 19)  # a half of RAM each
        tx.desc, tx.avail, tx.used = (tx.alloc(4096, 4096) for _ in range(3))
        tx.avail_idx = tx.used_idx = 0
        self.rx.setup_queue()
        self.tx.setup_queue()
        self.rx.set(Register.STATUS, 15)
        assert self.rx.status == 15

    def type(self, data: bytes) -> int:
        taken = self.device.receive(data)
        assert self.transport.service(RECEIVE) is None
        return taken


@pytest.fixture
def rig() -> ConsoleRig:
    return ConsoleRig()


def test_a_driver_that_runs_is_told_of_the_size(rig: ConsoleRig) -> None:
    """Linux's driver reads the size only after a change of the configuration."""
    assert rig.readies == []
    rig.start()
    assert rig.readies == [1]


def test_output_is_shown_in_order(rig: ConsoleRig) -> None:
    rig.start()
    tx = rig.tx
    for text in (b"hello, ", b"world\n"):
        tx.submit([readable(tx.put(text[:3]), 3), readable(tx.put(text[3:]), len(text) - 3)])
    assert rig.shown == b"hello, world\n"
    assert tx.reap() == [Used(0, 0), Used(0, 0)]


def test_a_huge_chain_is_cut(rig: ConsoleRig) -> None:
    rig.start()
    gpa = rig.tx.alloc(MAX_CHAIN_BYTES + 4096)
    rig.tx.submit([readable(gpa, MAX_CHAIN_BYTES + 4096), readable(gpa, 100)])
    assert len(rig.shown) == MAX_CHAIN_BYTES
    assert rig.tx.reap() == [Used(0, 0)]


def test_a_flood_of_output_holds_nobody_for_longer_than_a_buffers_length(rig: ConsoleRig) -> None:
    """Whoever shows it may wait for the terminal, with typed bytes and other vCPUs behind it."""
    rig.start()
    tx = rig.tx
    length = MAX_CHAIN_BYTES // 2
    gpa = tx.alloc(length)
    for head in range(5):
        tx.place([readable(gpa, length)], head)
    tx.notify()
    assert len(rig.shown) == 2 * length
    assert rig.deferred == [TRANSMIT]
    assert len(tx.reap()) == 2
    assert rig.transport.service(TRANSMIT) == 0.0
    assert rig.transport.service(TRANSMIT) is None
    assert len(rig.shown) == 5 * length
    assert len(tx.reap()) == 3


def test_a_chain_of_many_buffers_asks_for_no_more_room_once_it_is_cut(rig: ConsoleRig) -> None:
    rig.start()
    gpa = rig.tx.alloc(MAX_CHAIN_BYTES)
    rig.tx.submit([readable(gpa, MAX_CHAIN_BYTES), readable(gpa, 1), readable(gpa, 1)])
    assert rig.writes == 1


@pytest.mark.parametrize("gpa", [0, RAM_BASE + (1 << 20) - 1, (1 << 64) - 2])
def test_a_buffer_outside_ram_shows_nothing_and_stops_nothing(rig: ConsoleRig, gpa: int) -> None:
    rig.start()
    rig.tx.submit([readable(rig.tx.put(b"in"), 2), readable(gpa, 4)])
    rig.rx.submit([writable(gpa, 4)])
    rig.type(b"ab")
    assert rig.shown == b"in"
    assert (rig.tx.reap(), rig.rx.reap()) == ([Used(0, 0)], [Used(0, 0)])
    rig.tx.submit([readable(rig.tx.put(b"!"), 1)])
    assert rig.shown == b"in!"


def test_what_is_typed_goes_into_waiting_buffers(rig: ConsoleRig) -> None:
    rig.start()
    first, second = rig.rx.alloc(4), rig.rx.alloc(8)
    rig.rx.place([writable(first, 4)], 0)
    rig.rx.submit([writable(second, 8)], 1)
    assert rig.rx.reap() == []
    assert rig.type(b"abcdef") == 6
    assert rig.rx.reap() == [Used(0, 4), Used(1, 2)]
    assert rig.memory.read(first, 4) + rig.memory.read(second, 2) == b"abcdef"


def test_typed_bytes_wait_for_buffers_and_are_bounded(rig: ConsoleRig) -> None:
    rig.start()
    flood = bytes(range(256)) * 32
    assert rig.type(flood) == MAX_TYPED_BYTES
    assert rig.type(b"more") == 0
    before = len(rig.rooms)
    gpa = rig.rx.alloc(8192)
    rig.rx.submit([writable(gpa, 8192)])
    assert rig.rx.reap() == [Used(0, MAX_TYPED_BYTES)]
    assert rig.memory.read(gpa, MAX_TYPED_BYTES) == flood[:MAX_TYPED_BYTES]
    assert len(rig.rooms) > before
    assert rig.type(b"more") == 4


def test_nothing_is_typed_to_a_driver_that_is_not_there(rig: ConsoleRig) -> None:
    assert rig.type(b"early") == 0
    rig.start()
    assert rig.rooms
    assert rig.type(b"late") == 4
    rig.rx.set(Register.STATUS, 0)
    rig.start()
    gpa = rig.rx.alloc(16)
    rig.rx.submit([writable(gpa, 16)])
    assert rig.rx.reap() == []


def test_the_size_is_told_and_changes(rig: ConsoleRig) -> None:
    rig.start()
    assert rig.rx.offered & ConsoleFeature.SIZE
    assert rig.transport.read(Register.CONFIG, 4) == 80 | 24 << 16
    assert rig.device.resize((132, 43))
    rig.transport.config_changed()
    assert rig.transport.read(Register.CONFIG, 4) == 132 | 43 << 16
    assert rig.transport.read(Register.INTERRUPT_STATUS, 4) & InterruptBit.CONFIG_CHANGE
    assert not rig.device.resize((132, 43))


def test_emergency_write_needs_no_driver(rig: ConsoleRig) -> None:
    for character in b"dead":
        rig.transport.write(Register.CONFIG + 8, 4, character)
    rig.transport.write(Register.CONFIG, 4, 0)
    rig.transport.write(Register.CONFIG + 6, 4, 0xFFFF_FFFF)
    assert rig.shown == b"dead"


def test_chains_of_the_wrong_direction_and_empty_ones_come_back(rig: ConsoleRig) -> None:
    rig.start()
    gpa = rig.tx.alloc(64)
    rig.tx.submit([writable(gpa, 64)])
    rig.tx.submit([Descriptor(gpa, 0)])
    rig.rx.submit([readable(gpa, 64)])
    rig.type(b"x")
    assert rig.shown == b""
    assert len(rig.tx.reap()) == 2
    assert rig.rx.reap() == [Used(0, 0)]
