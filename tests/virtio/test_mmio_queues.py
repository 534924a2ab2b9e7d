"""Many queues, one queue's reset (VIRTIO_F_RING_RESET), and work that is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pyvmm.virtio.spec import Feature, InterruptBit, Register
from tests.support.echo_device import EchoRig
from tests.support.packed_driver import PackedDriver
from tests.support.patience import patient
from tests.support.virtio_driver import VirtioDriver, writable

BASE = int(Feature.VERSION_1 | Feature.RING_RESET)
PACKED = int(Feature.RING_PACKED)
QUEUES = 8
SIZE = 4


class Queues:
    """Eight drivers of one queue each, of the same device, in RAM of their own."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.rig = EchoRig(BASE | PACKED, [SIZE] * QUEUES)
        kind = PackedDriver if features & PACKED else VirtioDriver
        self.drivers = [
            kind(self.rig.transport, self.rig.memory, size=SIZE, index=i) for i in range(QUEUES)
        ]
        for i, driver in enumerate(self.drivers):
            self.lay_out(driver, i * 0x1000)
        self.start()

    def lay_out(self, driver: VirtioDriver, offset: int) -> None:
        """Move the driver's areas to ``offset`` in RAM, as new."""
        driver.restart()
        size = driver._top - driver.desc
        driver.memory.write(driver.desc + offset, bytes(size))
        for area in ("desc", "avail", "used"):
            setattr(driver, area, getattr(driver, area) + offset)
        driver._top += offset

    def start(self) -> None:
        """From reset to DRIVER_OK with every queue set up."""
        assert self.drivers[0].negotiate(self.features)
        for driver in self.drivers:
            driver.setup_queue()
        self.drivers[0].set(Register.STATUS, 15)

    def assert_serves(self, index: int) -> None:
        """Queue ``index`` returns a chain."""
        driver = self.drivers[index]
        buffer = driver.alloc(index + 1)
        driver.submit([writable(buffer, index + 1)])
        assert driver.reap() == [(0, index + 1)]
        assert driver.memory.read(buffer, index + 1) == bytes([index + 1]) * (index + 1)

    def reset_queue(self, index: int) -> None:
        """Write 1 to QueueReset of queue ``index``."""
        self.drivers[0].set(Register.QUEUE_SEL, index)
        self.drivers[0].set(Register.QUEUE_RESET, 1)

    def ready(self, index: int) -> int:
        """QueueReady of queue ``index``."""
        self.drivers[0].set(Register.QUEUE_SEL, index)
        return self.drivers[0].reg(Register.QUEUE_READY)


@pytest.fixture(params=["split", "packed"])
def queues(request: pytest.FixtureRequest) -> Iterator[Queues]:
    """A running device of eight queues."""
    running = Queues(BASE | PACKED if request.param == "packed" else BASE)
    yield running
    running.rig.transport.close()


def test_eight_queues_are_served_each_by_its_own_notification(queues: Queues) -> None:
    for index in (0, 7, 3, 3, 5, 1, 2, 4, 6):
        queues.assert_serves(index)
    assert queues.drivers[0].reg(Register.INTERRUPT_STATUS) == InterruptBit.USED_BUFFER
    assert len(queues.rig.irqs) == 9


def test_a_notification_serves_its_queue_only(queues: Queues) -> None:
    one, other = queues.drivers[2], queues.drivers[6]
    for driver in (one, other):
        driver.place([writable(driver.alloc(1), 1)])
    one.notify()
    assert one.reap() == [(0, 1)]
    assert other.reap() == []
    other.notify()
    assert other.reap() == [(0, 1)]


# RING_RESET


def test_queue_reset_resets_that_queue_and_no_other(queues: Queues) -> None:
    for index in range(QUEUES):
        queues.assert_serves(index)
    queues.reset_queue(3)
    assert queues.drivers[0].reg(Register.QUEUE_RESET) == 0  # it is over at once
    assert [queues.ready(i) for i in range(QUEUES)] == [1, 1, 1, 0, 1, 1, 1, 1]
    queue = queues.rig.device.queues[3]
    assert (queue.size, queue.ready, queue.descriptor_area) == (0, False, None)
    assert queues.rig.device.is_activated
    assert queues.drivers[0].status == 15
    for index in (0, 2, 4, 7):
        queues.assert_serves(index)


def test_nothing_of_a_reset_queue_is_touched(queues: Queues) -> None:
    driver = queues.drivers[1]
    queues.assert_serves(1)
    driver.place([writable(driver.alloc(1), 1)])
    queues.reset_queue(1)
    before = driver.memory.read(driver.memory.regions[0].gpa, 1 << 16)
    driver.notify()
    assert queues.rig.transport.service(1) is None
    assert driver.memory.read(driver.memory.regions[0].gpa, 1 << 16) == before
    assert driver.status == 15


def test_reset_queue_can_be_set_up_again_elsewhere_and_smaller(queues: Queues) -> None:
    driver = queues.drivers[5]
    for _ in range(SIZE + 1):
        queues.assert_serves(5)
    for size in (2, 4, 1):
        queues.reset_queue(5)
        driver.size = size
        queues.lay_out(driver, 0xA000 + 0x100 * size)
        driver.setup_queue()
        assert driver.reg(Register.QUEUE_READY) == 1
        assert driver.reg(Register.QUEUE_RESET) == 0
        for _ in range(3 * size):
            queues.assert_serves(5)
        queues.assert_serves(0)
    assert driver.status == 15


def test_registers_of_a_queue_that_was_not_reset_stay_frozen(queues: Queues) -> None:
    queues.reset_queue(3)
    other = queues.drivers[4]
    other.setup_queue(size=2, desc=1, avail=1, used=1)
    other.set(Register.QUEUE_READY, 0)  # stopped, which is not reset
    other.setup_queue()
    assert other.reg(Register.QUEUE_READY) == 0
    assert other.status == 15


def test_registers_are_frozen_again_once_the_queue_is_ready(queues: Queues) -> None:
    queues.reset_queue(3)
    driver = queues.drivers[3]
    queues.lay_out(driver, 0x3000)
    driver.setup_queue()
    driver.setup_queue(size=1, desc=1, avail=1, used=1)
    queues.assert_serves(3)
    driver.set(Register.QUEUE_READY, 0)
    driver.setup_queue()
    assert driver.reg(Register.QUEUE_READY) == 0


def test_malformed_queue_after_its_reset_needs_a_device_reset(queues: Queues) -> None:
    queues.reset_queue(3)
    driver = queues.drivers[3]
    driver.setup_queue(desc=8)
    assert driver.reg(Register.QUEUE_READY) == 0
    assert driver.needs_reset
    assert driver.reg(Register.INTERRUPT_STATUS) & InterruptBit.CONFIG_CHANGE
    assert "queue 3" in queues.rig.reports[0]
    for i, each in enumerate(queues.drivers):
        queues.lay_out(each, i * 0x1000)
    queues.start()
    for index in range(QUEUES):
        queues.assert_serves(index)


@pytest.mark.parametrize("value", [0, 2, 3, 0xFFFF_FFFF])
def test_queue_reset_takes_a_1_only(queues: Queues, value: int) -> None:
    queues.drivers[0].set(Register.QUEUE_SEL, 3)
    queues.drivers[0].set(Register.QUEUE_RESET, value)
    queues.assert_serves(3)


@pytest.mark.parametrize("index", [QUEUES, 0xFFFF_FFFF])
def test_queue_reset_of_no_queue_is_ignored(queues: Queues, index: int) -> None:
    queues.reset_queue(index)
    assert queues.drivers[0].reg(Register.QUEUE_RESET) == 0
    for each in range(QUEUES):
        queues.assert_serves(each)


def test_queue_reset_that_was_not_negotiated_is_ignored() -> None:
    queues = Queues(int(Feature.VERSION_1))
    queues.reset_queue(3)
    queues.assert_serves(3)


def test_device_reset_forgets_queue_resets(queues: Queues) -> None:
    queues.reset_queue(3)
    for i, each in enumerate(queues.drivers):
        queues.lay_out(each, i * 0x1000)
    assert queues.drivers[0].negotiate(queues.features)
    queues.drivers[0].setup_queue()
    queues.drivers[0].set(Register.STATUS, 15)
    queues.drivers[3].setup_queue()  # it was not reset in this life
    assert queues.ready(3) == 0
    queues.assert_serves(0)


def test_queue_reset_waits_for_the_pass_under_way(
    queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, go_on, is_reset = threading.Event(), threading.Event(), threading.Event()
    device, driver = queues.rig.device, queues.drivers[3]
    serve = device._serve

    def slow_serve(*args: object) -> int:
        serving.set()
        go_on.wait(patient(10))
        return serve(*args)  # type: ignore[arg-type]

    def reset() -> None:
        queues.reset_queue(3)
        is_reset.set()

    monkeypatch.setattr(device, "_serve", slow_serve)
    driver.place([writable(driver.alloc(1), 1)])
    server = threading.Thread(target=queues.rig.transport.service, args=(3,))
    resetter = threading.Thread(target=reset)
    server.start()
    assert serving.wait(patient(10))
    resetter.start()
    assert not is_reset.wait(0.05)
    go_on.set()
    resetter.join(patient(10))
    server.join(patient(10))
    assert driver.reap() == [(0, 1)]
    assert queues.ready(3) == 0


# Work that is left


def test_notification_that_leaves_work_asks_for_another_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = EchoRig()
    driver = VirtioDriver(rig.transport, rig.memory, size=4)
    driver.start()
    buffer = driver.alloc(1)
    serve = rig.device._serve

    def serve_and_offer(*args: object) -> int:
        monkeypatch.setattr(rig.device, "_serve", serve)
        driver.place([writable(buffer, 1)], 2)
        return serve(*args)  # type: ignore[arg-type]

    driver.submit([writable(buffer, 1)])
    assert rig.deferred == []
    assert driver.reap() == [(0, 1)]
    monkeypatch.setattr(rig.device, "_serve", serve_and_offer)
    driver.submit([writable(buffer, 1)])
    assert rig.deferred == [0]
    assert driver.reap() == [(0, 1)]
    assert rig.transport.service(0) is None
    assert driver.reap() == [(2, 1)]


@pytest.mark.parametrize("delay_s", [0.0, 0.25])
def test_service_passes_on_what_the_device_says(
    monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    rig = EchoRig()
    driver = VirtioDriver(rig.transport, rig.memory, size=4)
    driver.start()
    monkeypatch.setattr(rig.device, "process_queue", lambda index: delay_s)
    assert rig.transport.service(0) == delay_s
    driver.notify()
    assert rig.deferred == [0]
    assert rig.transport.service(2) is None
    assert rig.transport.service(-1) is None
