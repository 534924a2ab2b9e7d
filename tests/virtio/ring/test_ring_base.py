"""Rings that are stopped and go on elsewhere (Ring.base, Queue.base): nothing is lost or done
twice, whatever was on its way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ActivateError, RingError
from pyvmm.memory import GuestMemory
from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.ring.rings import first_base, make_ring
from pyvmm.virtio.spec import BlockFeature, Feature, Register
from tests.support.packed_driver import PackedDriver
from tests.support.virtio_driver import RAM_BASE, BlockDriver, readable, writable

SPLIT = int(Feature.VERSION_1 | Feature.INDIRECT_DESC | BlockFeature.FLUSH)
PACKED = SPLIT | int(Feature.RING_PACKED)
KINDS = pytest.mark.parametrize("features", [SPLIT, PACKED], ids=["split", "packed"])


class Interrupts:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def notify_used(self, queue_index: int) -> None:
        self.count += 1

    def notify_config(self) -> None:
        raise AssertionError("nothing changes here")


class Relay:
    """One queue in RAM, handed from device to device; what the test driver kicks."""

    def __init__(self, features: int, size: int, limit: RateLimit | None = None) -> None:
        self.features = features
        self.now_s = 0.0
        self.config = BlockConfig(queue_size=16, rate_limit=limit or RateLimit())
        self.memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
        self.interrupts = Interrupts()
        kind = PackedDriver if features & Feature.RING_PACKED else BlockDriver
        self.driver = kind(self, self.memory, size=size)
        self.delay_s: float | None = None
        self.hand_over(first_base(features))

    def hand_over(self, base: int | None) -> None:
        """A new device goes on with the queue at ``base``."""
        device = BlockDevice(self.config, MemoryBackend(bytearray(4096)), clock=lambda: self.now_s)
        device.set_acked_features(self.features)
        queue, driver = device.queues[0], self.driver
        queue.size, queue.base = driver.size, base
        queue.descriptor_area, queue.driver_area = driver.desc, driver.avail
        queue.device_area = driver.used
        device.activate(self.memory, self.interrupts)
        device.start_queue(0)
        self.device = device

    def read(self, offset: int, size: int) -> int:
        raise AssertionError("nothing is read")

    def write(self, offset: int, size: int, value: int) -> None:
        assert offset == Register.QUEUE_NOTIFY
        self.delay_s = self.device.process_queue(value)

    def offer_flush(self, head: int) -> None:
        """Make one more flush available, unannounced."""
        chain = [readable(self.driver.header(4), 16), writable(self.driver.status_byte(), 1)]
        self.driver.place(chain, head)


@KINDS
@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=40))
def test_a_ring_goes_on_where_it_was_stopped(
    features: int, batches: list[tuple[int, bool]]
) -> None:
    relay = Relay(features, 4)
    for count, waits in batches:
        for head in range(count):
            relay.offer_flush(2 * head)
        if not waits:
            relay.driver.notify()
        relay.hand_over(relay.device.stop_queue(0))
        relay.driver.notify()
        assert relay.driver.reap() == [(2 * head, 1) for head in range(count)]
        relay.driver._top = relay.driver.used + 64


@KINDS
def test_a_chain_that_a_rate_limit_holds_back_is_available_again(features: int) -> None:
    relay = Relay(features, 8, RateLimit(ops_per_s=1, ops_burst=1))
    for head in (0, 2, 4):
        relay.offer_flush(head)
    relay.driver.notify()
    assert relay.delay_s
    assert relay.driver.reap() == [(0, 1)]
    relay.config = BlockConfig(queue_size=16)
    relay.hand_over(relay.device.stop_queue(0))
    relay.driver.notify()
    assert relay.driver.reap() == [(2, 1), (4, 1)]


@pytest.mark.parametrize("start", range(5))
def test_a_held_chain_across_the_end_of_a_packed_ring(start: int) -> None:
    relay = Relay(PACKED, 5, RateLimit(ops_per_s=1, ops_burst=start + 1))
    for _ in range(start + 1):
        relay.offer_flush(0)
        relay.driver.notify()
        assert relay.driver.reap() == [(0, 1)]
    relay.offer_flush(0)
    relay.driver.notify()
    assert relay.delay_s
    assert relay.driver.reap() == []
    relay.config = BlockConfig(queue_size=16)
    relay.hand_over(relay.device.stop_queue(0))
    relay.driver.notify()
    assert relay.driver.reap() == [(0, 1)]


def test_a_ring_that_begins_does_not_look_at_the_used_index() -> None:
    relay = Relay(SPLIT, 4)
    relay.memory.write_int(relay.driver.used + 2, 2, 77)
    relay.hand_over(None)
    relay.offer_flush(0)
    relay.driver.notify()
    assert relay.memory.read_int(relay.driver.used + 2, 2) == 1


@pytest.mark.parametrize(
    ("features", "base"),
    [
        (SPLIT, 0x1_0000),
        (SPLIT, 5),
        (SPLIT, 0xFFFF),
        (PACKED, 0x8000_8004),  # slot 4 of 4
        (PACKED, 0x8004_8000),
        (PACKED, 0x8001_8000),  # more was used than taken
        (PACKED, 0x8000_0001),  # more was taken than there are slots
    ],
)
def test_a_base_that_cannot_be_is_refused(features: int, base: int) -> None:
    relay = Relay(features, 4)
    with pytest.raises(RingError, match="ring base"):
        relay.hand_over(base)


@pytest.mark.parametrize(
    ("features", "base"),
    [(SPLIT, 0), (SPLIT, 4), (PACKED, 0x8000_8000), (PACKED, 0x8000_0000), (PACKED, 0x0003_0003)],
)
def test_a_base_that_can_be_comes_back(features: int, base: int) -> None:
    relay = Relay(features, 4)
    relay.hand_over(base)
    assert relay.device.stop_queue(0) == base
    ring = make_ring(relay.device.queues[0], relay.memory, features)
    assert ring.base == base


def test_stopping_a_queue_that_has_no_ring() -> None:
    device = BlockDevice(BlockConfig(), MemoryBackend(bytearray(4096)))
    assert device.stop_queue(0) == 0


def test_activation_takes_a_base_too() -> None:
    relay = Relay(SPLIT, 4)
    device = BlockDevice(relay.config, MemoryBackend(bytearray(4096)))
    device.set_acked_features(SPLIT)
    queue = device.queues[0]
    queue.size, queue.base, queue.ready = 4, 9, True
    queue.descriptor_area = relay.driver.desc
    queue.driver_area, queue.device_area = relay.driver.avail, relay.driver.used
    with pytest.raises(ActivateError, match="ring base 9 is not within 4 of the used index 0"):
        device.activate(relay.memory, relay.interrupts)


@KINDS
def test_a_malformed_chain_stays_where_the_ring_stands(features: int) -> None:
    """The chains before it are answered, and the base is that of the malformed one."""
    relay = Relay(features, 8)
    relay.offer_flush(0)
    begun = relay.device.stop_queue(0)
    relay.hand_over(begun)
    driver = relay.driver
    driver.place([writable(driver.status_byte(), 1), readable(driver.header(4), 16)], 2)
    with pytest.raises(RingError, match="device-readable descriptor after"):
        driver.notify()
    assert driver.reap() == [(0, 1)]
    # One entry of a split ring, two slots of a packed one.
    step = 2 * 0x1_0001 if features & Feature.RING_PACKED else 1
    assert relay.device.stop_queue(0) == begun + step
