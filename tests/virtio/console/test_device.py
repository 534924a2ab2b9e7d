"""The console device: output in order and whole, input when there is some, nothing unbounded."""

from __future__ import annotations

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.virtio.console.device import (
    HOLD_S,
    MAX_CHAIN_BYTES,
    MAX_HOLD_S,
    MAX_TYPED_BYTES,
    ConsoleDevice,
)
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
        self.size = (80, 24)
        self.news: list[str] = []
        self.irqs: list[int] = []
        self.now_s = 1000.0
        self.memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
        self.device = ConsoleDevice(
            self.show, lambda: self.rooms.append(1), size=lambda: self.size,
            clock=lambda: self.now_s,
        )
        self.device.plug(self)
        self.transport = MmioTransport(
            self.device, self.memory, lambda: self.irqs.append(1), report=print,
            defer=self.deferred.append,
        )
        self.rx, self.tx = (
            VirtioDriver(self.transport, self.memory, index=i) for i in (RECEIVE, TRANSMIT)
        )

    # The slot (pyvmm.virtio.device.Plug)

    irq_fd = -1
    doorbells: tuple[int, ...] = ()

    def serve(self, queue_index: int) -> None:
        self.news.append(f"serve {queue_index}")

    def refresh(self) -> None:
        self.news.append("refresh")

    def show(self, data: bytes) -> None:
        self.writes += 1
        self.shown += data

    def start(self) -> None:
        """A driver starts, and is long enough there to be given input."""
        self.start_driver()
        self.now_s += MAX_HOLD_S

    def start_driver(self) -> None:
        assert self.rx.negotiate()
        for driver, half in ((self.rx, RAM_BASE), (self.tx, RAM_BASE + (1 << 19))):
            driver._top = half
            driver.desc, driver.avail, driver.used = (driver.alloc(4096, 4096) for _ in range(3))
            driver.avail_idx = driver.used_idx = 0
        self.rx.setup_queue()
        self.tx.setup_queue()
        self.rx.set(Register.STATUS, 15)
        assert self.rx.status == 15

    def type(self, data: bytes) -> int:
        taken = self.device.receive(data)
        assert self.transport.service(RECEIVE) in (None, HOLD_S)
        return taken


@pytest.fixture
def rig() -> ConsoleRig:
    return ConsoleRig()


def test_a_driver_that_runs_is_told_of_the_size_and_gets_what_waits(rig: ConsoleRig) -> None:
    """Linux's driver reads the size only after a change of the configuration."""
    assert rig.news == []
    for _ in range(2):  # the second driver as well
        assert not rig.device.refresh()
        rig.start()
        assert rig.news == ["refresh", f"serve {RECEIVE}"]
        assert rig.device.refresh()
        assert not rig.device.refresh()
        rig.rx.set(Register.STATUS, 0)
        rig.rx.restart()
        rig.news.clear()


def test_the_thread_is_told_of_typed_bytes(rig: ConsoleRig) -> None:
    rig.device.receive(b"too early")
    assert rig.news == []
    rig.start()
    rig.news.clear()
    rig.device.receive(b"typed")
    assert rig.news == [f"serve {RECEIVE}"]


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


def test_what_one_driver_has_not_read_is_for_the_next(rig: ConsoleRig) -> None:
    rig.start()
    assert rig.type(b"typed") == 5
    rig.rx.set(Register.STATUS, 0)
    rig.start()
    gpa = rig.rx.alloc(16)
    rig.rx.submit([writable(gpa, 16)])
    assert rig.rx.reap() == [Used(0, 5)]
    assert rig.memory.read(gpa, 5) == b"typed"


class LinuxPort:
    """Linux's driver: buffers it offers before its port is listed come back to be thrown away."""

    def __init__(self, rig: ConsoleRig) -> None:
        self.rig = rig
        self.is_listed = False
        self.heard = b""
        self.buffer = rig.rx.alloc(64)
        rig.rx.submit([writable(self.buffer, 64)])

    def say(self, text: bytes) -> None:
        self.rig.tx.submit([readable(self.rig.tx.put(text), len(text))])
        self.rig.tx.reap()

    def interrupt(self) -> None:
        for used in self.rig.rx.reap():
            if self.is_listed:
                self.heard += self.rig.memory.read(self.buffer, used.length)
            self.rig.rx.submit([writable(self.buffer, 64)])


def pass_time(rig: ConsoleRig, port: LinuxPort, duration_s: float) -> None:
    """As the console's thread does, which comes back when it was told to."""
    until_s = rig.now_s + duration_s
    while True:
        delay_s = rig.transport.service(RECEIVE)
        port.interrupt()
        if delay_s is None or rig.now_s + delay_s > until_s:
            break
        rig.now_s += delay_s
    rig.now_s = until_s


@pytest.mark.parametrize("lives", [1, 3], ids=["first driver", "after resets"])
def test_fault_30_input_waits_until_the_port_has_sent_something(
    rig: ConsoleRig, lives: int
) -> None:
    for life in range(lives):
        typed = b"early %d" % life
        rig.start_driver()
        port = LinuxPort(rig)
        assert rig.type(typed) == len(typed)
        pass_time(rig, port, MAX_HOLD_S / 2)
        assert port.heard == b""
        port.say(b"console [hvc0] enabled")  # by another CPU, in a moment the port is listed
        pass_time(rig, port, HOLD_S / 2)
        port.is_listed = True
        pass_time(rig, port, HOLD_S)
        assert port.heard == typed
        rig.type(b" late")
        pass_time(rig, port, 0.0)
        assert port.heard == typed + b" late", "and then at once"
        rig.rx.set(Register.STATUS, 0)


def test_fault_30_a_driver_that_only_reads_waits_for_a_while(rig: ConsoleRig) -> None:
    rig.start_driver()
    port = LinuxPort(rig)
    port.is_listed = True
    rig.type(b"typed")
    pass_time(rig, port, MAX_HOLD_S - HOLD_S)
    assert port.heard == b""
    pass_time(rig, port, 2 * HOLD_S)
    assert port.heard == b"typed"


def test_fault_30_a_notification_during_the_hold_has_the_thread_come_back(rig: ConsoleRig) -> None:
    rig.start_driver()
    rig.type(b"typed")
    rig.rx.submit([writable(rig.rx.alloc(8), 8)])
    assert rig.deferred[-1:] == [RECEIVE]


def test_the_size_is_told_and_changes(rig: ConsoleRig) -> None:
    rig.start()
    assert rig.rx.offered & ConsoleFeature.SIZE
    assert rig.transport.read(Register.CONFIG, 4) == 80 | 24 << 16
    assert rig.device.refresh()  # a driver that has begun
    rig.size = (132, 43)
    assert rig.device.refresh()
    rig.transport.config_changed()
    assert rig.transport.read(Register.CONFIG, 4) == 132 | 43 << 16
    assert rig.transport.read(Register.INTERRUPT_STATUS, 4) & InterruptBit.CONFIG_CHANGE
    assert not rig.device.refresh()


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
