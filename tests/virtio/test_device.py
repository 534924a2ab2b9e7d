"""What all devices have in common, without a transport: activation, passes, queue resets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pyvmm.errors import ActivateError, GuestError, RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.spec import Feature
from tests.support.echo_device import EchoDevice
from tests.support.virtio_driver import RAM_BASE, VirtioDriver, writable

V1 = int(Feature.VERSION_1)
FEATURES = int(Feature.VERSION_1 | Feature.RING_RESET | Feature.INDIRECT_DESC)


class Interrupts:
    """Counts who was told what."""

    def __init__(self) -> None:
        self.used: list[int] = []
        self.config = 0

    def notify_used(self, queue_index: int) -> None:
        self.used.append(queue_index)

    def notify_config(self) -> None:
        self.config += 1


class NoRegisters:
    """The driver helper is used for its rings only."""

    def read(self, offset: int, size: int) -> int:
        raise AssertionError("no registers here")

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError("no registers here")


class Setup:
    """An EchoDevice with queues of 8 and 4 entries, and a driver of one of them."""

    def __init__(self, index: int = 0) -> None:
        self.device = EchoDevice(FEATURES, (8, 4))
        self.memory = GuestMemory.over(bytearray(1 << 16), RAM_BASE)
        self.interrupts = Interrupts()
        self.index = index
        self.driver = VirtioDriver(NoRegisters(), self.memory, size=4)
        self.device.set_acked_features(V1 | Feature.RING_RESET)
        self.describe()

    def describe(self, *, ready: bool = True) -> None:
        """What a transport does when the driver sets a queue up."""
        queue = self.device.queues[self.index]
        queue.size = self.driver.size
        queue.descriptor_area = self.driver.desc
        queue.driver_area = self.driver.avail
        queue.device_area = self.driver.used
        queue.ready = ready

    def activate(self) -> None:
        self.device.activate(self.memory, self.interrupts)

    def offer(self, heads: Sequence[int]) -> None:
        for head in heads:
            self.driver.place([writable(self.driver.alloc(5), 5)], head)


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_pass_serves_publishes_and_interrupts_once(setup: Setup) -> None:
    setup.activate()
    setup.offer([2, 0, 3])
    assert setup.device.process_queue(0) is None
    assert setup.driver.reap() == [(2, 5), (0, 5), (3, 5)]
    assert setup.interrupts.used == [0]
    assert setup.device.process_queue(0) is None
    assert setup.interrupts.used == [0]


def test_interrupt_names_the_queue() -> None:
    setup = Setup(index=1)
    setup.activate()
    setup.offer([1])
    assert setup.device.process_queue(0) is None
    assert setup.driver.reap() == []
    assert setup.device.process_queue(1) is None
    assert setup.interrupts.used == [1]


def test_no_work_before_activation_and_after_reset(setup: Setup) -> None:
    setup.offer([0])
    assert setup.device.process_queue(0) is None
    setup.activate()
    setup.device.reset()
    assert not setup.device.is_activated
    assert setup.device.process_queue(0) is None
    assert setup.driver.reap() == []


def test_activation_is_refused_while_active_and_works_again_after_reset(setup: Setup) -> None:
    setup.activate()
    with pytest.raises(ActivateError, match="reset first"):
        setup.activate()
    setup.device.reset()
    assert setup.device.acked_features == 0
    setup.describe()
    setup.activate()
    setup.offer([0])
    assert setup.device.process_queue(0) is None
    assert setup.driver.reap() == [(0, 5)]


def test_activation_with_a_malformed_queue_leaves_the_device_inactive(setup: Setup) -> None:
    setup.device.queues[0].size = 3
    with pytest.raises(ActivateError, match="power of 2"):
        setup.activate()
    assert not setup.device.is_activated


def test_malformed_ring_publishes_what_was_served_before(setup: Setup) -> None:
    setup.activate()
    setup.offer([0])
    setup.driver.write_table([writable(RAM_BASE, 1)._replace(flags=3, following=77)], 1)
    setup.driver.offer(1)
    with pytest.raises(RingError, match="77"):
        setup.device.process_queue(0)
    assert setup.driver.reap() == [(0, 5)]
    assert setup.interrupts.used == [0]


def test_features_are_replaced(setup: Setup) -> None:
    device = setup.device
    device.set_acked_features(FEATURES)
    device.set_acked_features(V1)
    assert device.acked_features == V1
    for features in (0, V1 | 1, int(Feature.RING_RESET)):
        with pytest.raises(GuestError):
            device.set_acked_features(features)
    assert device.acked_features == V1


def test_queue_reset_stops_one_queue_until_it_is_started_again(setup: Setup) -> None:
    device, driver = setup.device, setup.driver
    setup.activate()
    setup.offer([0, 1])
    device.reset_queue(0)
    queue = device.queues[0]
    assert (queue.size, queue.ready, queue.descriptor_area) == (0, False, None)
    assert device.process_queue(0) is None
    assert driver.reap() == []

    driver.restart()
    setup.describe(ready=False)
    assert device.process_queue(0) is None
    device.start_queue(0)
    setup.offer([3])
    assert device.process_queue(0) is None
    assert driver.reap() == [(3, 5)]
    assert device.is_activated


def test_start_of_a_malformed_queue_is_a_ring_error(setup: Setup) -> None:
    setup.activate()
    setup.device.reset_queue(0)
    setup.describe(ready=False)
    setup.device.queues[0].device_area = 3
    with pytest.raises(RingError, match="aligned"):
        setup.device.start_queue(0)
    assert setup.device.process_queue(0) is None


def test_queue_reset_before_activation(setup: Setup) -> None:
    setup.device.reset_queue(0)
    setup.device.start_queue(0)
    assert not setup.device.queues[0].ready
    setup.describe()
    setup.activate()
    setup.offer([1])
    assert setup.device.process_queue(0) is None
    assert setup.driver.reap() == [(1, 5)]
