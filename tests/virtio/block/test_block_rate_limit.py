"""A rate-limited disk: process_queue says when to come back, and nothing else ever waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.rate_limit import MAX_WAIT_S, RateLimit, RateLimiter
from pyvmm.virtio.spec import BlockFeature, Feature, Register
from tests.support.packed_driver import FEATURES as PACKED
from tests.support.packed_driver import PackedDriver
from tests.support.virtio_driver import (
    RAM_BASE,
    STATUS_POISON,
    BlockDriver,
    readable,
    writable,
)

IN, FLUSH, DISCARD = 0, 4, 11


class LimitedDisk:
    """A running device of 64 sectors behind a transport, on a clock that stands still."""

    def __init__(self, limit: RateLimit) -> None:
        self.now_s = 100.0
        self.memory = GuestMemory.over(bytearray(1 << 18), RAM_BASE)
        self.device = BlockDevice(
            BlockConfig(queue_size=64, rate_limit=limit),
            MemoryBackend(bytearray(64 * 512)),
            clock=lambda: self.now_s,
        )
        self.irqs: list[None] = []
        self.transport = MmioTransport(
            self.device, self.memory, lambda: self.irqs.append(None), report=print
        )
        self.driver = BlockDriver(self.transport, self.memory, size=64)
        self.driver.start()

    def offer(self, count: int, request_type: int = IN, length: int = 512) -> None:
        """Make ``count`` more requests available."""
        for _ in range(count):
            head = 3 * (self.driver.avail_idx % 21)
            header, status = self.driver.header(request_type), self.driver.status_byte()
            chain = [readable(header, 16)]
            if length:
                chain.append(writable(self.driver.alloc(length), length))
            self.driver.place([*chain, writable(status, 1)], head)

    def served(self) -> int:
        return len(self.driver.reap())

    def service(self) -> float | None:
        return self.transport.service(0)


@pytest.fixture
def limited() -> Iterator[Callable[[RateLimit], LimitedDisk]]:
    disks: list[LimitedDisk] = []

    def make(limit: RateLimit) -> LimitedDisk:
        disks.append(LimitedDisk(limit))
        return disks[-1]

    yield make
    for disk in disks:
        disk.transport.close()


Make = Callable[[RateLimit], LimitedDisk]


def test_operations(limited: Make) -> None:
    disk = limited(RateLimit(ops_per_s=10, ops_burst=4))
    disk.offer(6)
    assert disk.service() == pytest.approx(0.1)
    assert disk.served() == 4
    assert len(disk.irqs) == 1
    assert disk.service() == pytest.approx(0.1)  # too early: nothing happens
    assert (disk.served(), len(disk.irqs)) == (0, 1)
    disk.now_s += 0.1
    assert disk.service() == pytest.approx(0.1)
    assert disk.served() == 1
    disk.now_s += 0.1
    assert disk.service() is None
    assert disk.served() == 1


def test_bytes(limited: Make) -> None:
    disk = limited(RateLimit(bytes_per_s=10_240, bytes_burst=1024))
    disk.offer(3)
    assert disk.service() == pytest.approx(0.05)
    assert disk.served() == 2
    disk.now_s += 0.05
    assert disk.service() is None
    assert disk.served() == 1


def test_flush_is_charged_as_one_operation_and_no_bytes(limited: Make) -> None:
    disk = limited(RateLimit(ops_per_s=10, ops_burst=2, bytes_per_s=1024, bytes_burst=512))
    disk.offer(1)
    disk.offer(1, FLUSH, length=0)
    disk.offer(1, FLUSH, length=0)
    assert disk.service() == pytest.approx(0.1)
    assert disk.served() == 2


def test_oversize_request_passes_by_borrowing(limited: Make) -> None:
    disk = limited(RateLimit(bytes_per_s=10_240, bytes_burst=1024))
    disk.offer(1, length=2048)
    disk.offer(1)
    assert disk.service() == pytest.approx(0.15)  # 1024 borrowed, 512 wanted
    assert disk.served() == 1
    disk.now_s += 0.15
    assert disk.service() is None
    assert disk.served() == 1


def test_absurd_length_is_charged_as_no_more_than_the_disk(limited: Make) -> None:
    disk = limited(RateLimit(bytes_per_s=64 * 512, bytes_burst=512))
    driver = disk.driver
    chain = [readable(driver.header(IN), 16)] + [writable(RAM_BASE, 2**32 - 512)] * 8
    driver.place([*chain, writable(driver.status_byte(), 1)], 0)
    driver.place([readable(driver.header(IN), 16), *2 * [writable(driver.alloc(512), 512)]], 20)
    assert disk.service() == MAX_WAIT_S
    disk.now_s += 1.1
    assert disk.service() is None
    assert disk.served() == 2


def test_no_limit_never_waits(limited: Make) -> None:
    disk = limited(RateLimit())
    for _ in range(15):
        disk.offer(20)
        assert disk.service() is None
    assert disk.driver.status == 15


def test_limit_changes_while_running(limited: Make) -> None:
    disk = limited(RateLimit())
    disk.device.set_rate_limit(RateLimit(ops_per_s=1, ops_burst=2))
    disk.offer(10)
    assert disk.service() == MAX_WAIT_S
    assert disk.served() == 2
    disk.device.set_rate_limit(RateLimit(ops_per_s=100, ops_burst=2))
    disk.now_s += 0.01
    assert disk.service() == pytest.approx(0.01)
    assert disk.served() == 1
    # Lifted: the request that was held back goes first.
    disk.device.set_rate_limit(RateLimit())
    assert disk.service() is None
    assert [used.head for used in disk.driver.reap()] == [3 * i for i in range(3, 10)]


def test_requests_keep_their_order(limited: Make) -> None:
    disk = limited(RateLimit(ops_per_s=10, ops_burst=1))
    disk.offer(5)
    heads = []
    while disk.service() is not None:
        heads += [used.head for used in disk.driver.reap()]
        disk.now_s += 0.1
    heads += [used.head for used in disk.driver.reap()]
    assert heads == [0, 3, 6, 9, 12]


def test_limited_disk_lets_registers_through_and_resets(limited: Make) -> None:
    disk = limited(RateLimit(ops_per_s=1, ops_burst=1))
    disk.offer(3)
    assert disk.service() is not None
    # Nothing holds the lock: a reset returns at once, and what waited is gone for good.
    disk.driver.set(Register.STATUS, 0)
    assert disk.driver.status == 0
    disk.now_s += 10
    ram = bytes(disk.memory.view(RAM_BASE, 1 << 18))
    assert disk.service() is None
    assert disk.memory.view(RAM_BASE, 1 << 18) == ram
    disk.driver.start()
    assert disk.driver.request(IN, room=512).status == 0
    # The driver does not get a fresh burst by resetting.
    disk.driver.start()
    disk.offer(1)
    assert disk.service() == MAX_WAIT_S
    assert disk.served() == 0


def test_held_request_is_dropped_by_a_queue_reset(limited: Make) -> None:
    disk = limited(RateLimit(ops_per_s=10, ops_burst=1))
    driver = disk.driver
    features = Feature.VERSION_1 | Feature.RING_RESET | BlockFeature.FLUSH
    driver.start(int(features))
    disk.offer(3)
    assert disk.service() is not None
    assert disk.served() == 1
    driver.set(Register.QUEUE_SEL, 0)
    driver.set(Register.QUEUE_RESET, 1)
    disk.now_s += 1
    assert disk.service() is None
    driver.restart()
    driver.setup_queue()
    assert disk.service() is None
    assert disk.served() == 0
    assert driver.request(IN, room=512).status == 0


def test_two_queues_share_one_limit() -> None:
    now_s = 0.0
    device = BlockDevice(
        BlockConfig(queues=2, rate_limit=RateLimit(ops_per_s=10, ops_burst=1)),
        MemoryBackend(bytearray(512)),
        clock=lambda: now_s,
    )
    memory = GuestMemory.over(bytearray(1 << 17), RAM_BASE)
    transport = MmioTransport(device, memory, lambda: None, report=print)
    low = BlockDriver(transport, memory)
    high = BlockDriver(transport, memory, index=1)
    high.desc, high.avail, high.used = (RAM_BASE + (1 << 16) + 0x1000 * i for i in range(3))
    low.negotiate()
    low.setup_queue()
    high.setup_queue()
    low.set(Register.STATUS, 15)
    for driver in (low, high):
        header, status = low.header(FLUSH), low.status_byte()
        driver.place([readable(header, 16), writable(status, 1)])
    assert transport.service(0) is None
    assert transport.service(1) == pytest.approx(0.1)
    now_s += 0.1
    assert transport.service(1) is None
    assert len(low.reap()) == len(high.reap()) == 1
    transport.close()


def test_devices_of_one_disk_share_its_limit() -> None:
    """Each with a place of its own in the line, though their queues have the same number."""
    limiter = RateLimiter(RateLimit(ops_per_s=10, ops_burst=1), clock=lambda: 0.0)
    drivers, transports = [], []
    for _ in range(3):
        memory = GuestMemory.over(bytearray(1 << 16), RAM_BASE)
        device = BlockDevice(BlockConfig(), MemoryBackend(bytearray(512)), limiter=limiter)
        transport = MmioTransport(device, memory, lambda: None, report=print)
        driver = BlockDriver(transport, memory)
        driver.start()
        driver.place([readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)])
        drivers.append(driver)
        transports.append(transport)
    assert transports[0].service(0) is None
    assert transports[1].service(0) == pytest.approx(0.1)
    assert transports[2].service(0) == pytest.approx(0.1)
    assert [len(driver.reap()) for driver in drivers] == [1, 0, 0]
    transports[1].close()  # its turn is the next one's
    limiter.change(RateLimit())
    assert transports[2].service(0) is None
    assert len(drivers[2].reap()) == 1
    transports[0].close()
    transports[2].close()


def test_bad_input_18_a_held_chain_counts_as_outstanding(limited: Make) -> None:
    """A driver that offers a whole queue more while one chain is held back has lost count."""
    disk = limited(RateLimit(ops_per_s=1, ops_burst=1))
    disk.offer(2)
    assert disk.service() == MAX_WAIT_S
    assert disk.served() == 1
    driver = disk.driver
    driver.offer(*range(64))
    disk.device.set_rate_limit(RateLimit())
    disk.service()
    assert driver.needs_reset


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("lifted", [False, True], ids=["in its time", "limit lifted"])
def test_fault_10_a_held_head_that_is_offered_again(
    limited: Make, behind: int, lifted: bool
) -> None:
    """The chain that a rate limit holds is outstanding: its head, again, is a mistake."""
    disk = limited(RateLimit(ops_per_s=10, ops_burst=1))
    driver = disk.driver
    disk.offer(2 + behind, FLUSH, length=0)
    assert disk.service() == pytest.approx(0.1)
    assert [used.head for used in driver.reap()] == [0]
    assert disk.service() == pytest.approx(0.1), "too early: it is held still"
    driver.offer(3)
    assert disk.service() == pytest.approx(0.1)
    if lifted:
        disk.device.set_rate_limit(RateLimit())
    for _ in range(behind + 2):
        disk.now_s += 0.1
        disk.service()
    assert [used.head for used in driver.reap()] == [3], "once, because it was taken in time"
    assert driver.needs_reset
    driver.start()
    assert driver.request(IN, 0, room=512).status == 0


def test_heads_of_held_chains_may_be_offered_again_once_they_are_back(limited: Make) -> None:
    disk = limited(RateLimit(ops_per_s=10, ops_burst=1))
    for _ in range(5):
        disk.offer(2, FLUSH, length=0)
        while (delay_s := disk.service()) is not None:
            disk.now_s += delay_s
        assert disk.served() == 2
    assert not disk.driver.needs_reset


def test_a_stopped_queue_holds_up_no_other() -> None:
    """QueueReady = 0 while its chain waits for a turn: the turn is the next queue's."""
    now_s = 0.0
    device = BlockDevice(
        BlockConfig(queues=2, rate_limit=RateLimit(ops_per_s=10, ops_burst=1)),
        MemoryBackend(bytearray(512)),
        clock=lambda: now_s,
    )
    memory = GuestMemory.over(bytearray(1 << 17), RAM_BASE)
    transport = MmioTransport(device, memory, lambda: None, report=print)
    low = BlockDriver(transport, memory)
    high = BlockDriver(transport, memory, index=1)
    high.desc, high.avail, high.used = (RAM_BASE + (1 << 16) + 0x1000 * i for i in range(3))
    low.negotiate()
    low.setup_queue()
    high.setup_queue()
    low.set(Register.STATUS, 15)
    for driver, heads in ((low, (0, 2)), (high, (0,))):
        for head in heads:
            header, status = low.header(FLUSH), low.status_byte()
            driver.place([readable(header, 16), writable(status, 1)], head)
    assert transport.service(0) == pytest.approx(0.1), "the second flush waits, first in the line"
    assert transport.service(1) is not None
    low.set(Register.QUEUE_SEL, 0)
    low.set(Register.QUEUE_READY, 0)
    now_s += 0.1
    assert transport.service(1) is None
    assert len(high.reap()) == 1
    transport.close()


def test_fault_10_slots_of_a_held_chain_that_are_offered_again() -> None:
    """A packed ring's slots are taken as often as they are given back: what a driver puts over
    a chain that waits is not served."""
    config = BlockConfig(queue_size=16, rate_limit=RateLimit(ops_per_s=10, ops_burst=1))
    device = BlockDevice(config, MemoryBackend(bytearray(512)), clock=lambda: 0.0)
    memory = GuestMemory.over(bytearray(1 << 17), RAM_BASE)
    transport = MmioTransport(device, memory, lambda: None, report=print)
    driver = PackedDriver(transport, memory, size=4)
    driver.start(PACKED)
    statuses = []
    for head in range(4):  # two slots each: the third is where the first was, the last is wrong
        statuses.append(driver.status_byte())
        driver.place([readable(driver.header(FLUSH), 16), writable(statuses[-1], 1)], head)
        if head == 1:
            assert transport.service(0) == pytest.approx(0.1)
            assert [used.head for used in driver.reap()] == [0]
    device.set_rate_limit(RateLimit())
    while transport.service(0) is not None:
        pass
    assert memory.read_int(statuses[1], 1) == 0
    assert memory.read_int(statuses[3], 1) == STATUS_POISON
    assert [used.head for used in driver.reap()] == [1, 2]
    transport.close()
