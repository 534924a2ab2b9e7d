"""Where a virtqueue's parts may be: next to each other, and never in each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyvmm.errors import RingError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.ring.queue import Queue
from pyvmm.virtio.ring.rings import make_ring
from pyvmm.virtio.spec import Feature, InterruptBit, Register
from tests.support.packed_driver import FEATURES as PACKED
from tests.support.packed_driver import PackedDriver
from tests.support.rig import Rig
from tests.support.virtio_driver import RAM_BASE, BlockDriver
from tests.virtio.conftest import MakeRig

SPLIT = int(Feature.VERSION_1)
EVENT_IDX = SPLIT | int(Feature.EVENT_IDX)
SIZE = 16
DESC = RAM_BASE + 0x1000
IN = 0


def queue_at(desc: int, avail: int, used: int) -> Queue:
    queue = Queue(SIZE)
    queue.size = SIZE
    queue.descriptor_area, queue.driver_area, queue.device_area = desc, avail, used
    return queue


OVERLAPS = [
    # Split: 256 bytes of table, 38 of available ring, 134 of used ring.
    (SPLIT, DESC, DESC, DESC + 0x400),
    (SPLIT, DESC, DESC + 254, DESC + 0x400),
    (SPLIT, DESC + 32, DESC, DESC + 0x400),
    (SPLIT, DESC, DESC + 0x400, DESC),
    (SPLIT, DESC, DESC + 0x400, DESC + 252),
    (SPLIT, DESC + 128, DESC + 0x400, DESC),
    (SPLIT, DESC, DESC + 0x400, DESC + 0x400),
    (SPLIT, DESC, DESC + 0x400, DESC + 0x400 + 32),
    (EVENT_IDX, DESC, DESC + 0x400, DESC + 0x400 + 36),
    (EVENT_IDX, DESC, DESC + 0x400 + 132, DESC + 0x400),
    # Packed: 256 bytes of ring, 4 of each event suppression structure.
    (PACKED, DESC, DESC, DESC + 0x400),
    (PACKED, DESC, DESC + 252, DESC + 0x400),
    (PACKED, DESC, DESC + 0x400, DESC + 128),
    (PACKED, DESC, DESC + 0x400, DESC + 0x400),
]
NEIGHBOURS = [
    (SPLIT, DESC, DESC + 256, DESC + 256 + 40),
    # Without EVENT_IDX there are no event fields.
    (SPLIT, DESC, DESC + 256, DESC + 256 + 36),
    (EVENT_IDX, DESC + 136 + 40, DESC + 136, DESC),
    (PACKED, DESC, DESC + 256, DESC + 260),
    (PACKED, DESC, DESC - 4, DESC - 8),
]


@pytest.mark.parametrize(("features", "desc", "avail", "used"), OVERLAPS)
def test_fault_10_parts_of_a_queue_that_overlap(
    rig: Rig, features: int, desc: int, avail: int, used: int
) -> None:
    driver = rig.driver
    assert driver.negotiate(features)
    driver.setup_queue(desc=desc, avail=avail, used=used)
    assert driver.reg(Register.QUEUE_READY) == 0
    assert driver.needs_reset
    assert "overlaps" in rig.reports[0]
    assert rig.interrupt_status() & InterruptBit.CONFIG_CHANGE
    rig.assert_works()


@pytest.mark.parametrize(("features", "desc", "avail", "used"), NEIGHBOURS)
def test_fault_10_parts_of_a_queue_that_touch(
    rig: Rig, features: int, desc: int, avail: int, used: int
) -> None:
    kind = PackedDriver if features == PACKED else BlockDriver
    driver = kind(rig.transport, rig.memory, size=SIZE)
    assert driver.negotiate(features)
    driver.desc, driver.avail, driver.used = desc, avail, used
    driver.setup_queue()
    driver._top = DESC + 0x1000
    driver.set(Register.STATUS, 15)
    assert driver.request(IN, 3, room=512).data == b"\3" * 512
    assert not driver.needs_reset


def two_queues(new_rig: MakeRig, features: int) -> Callable[[int, int, int], Rig]:
    """Sets up queue 0 at DESC with 0x400 bytes between its parts, and queue 1 where asked."""

    def set_up(desc: int, avail: int, used: int) -> Rig:
        rig = new_rig(config=BlockConfig(queue_size=SIZE, queues=2))
        assert rig.driver.negotiate(features)
        rig.driver.setup_queue(desc=DESC, avail=DESC + 0x400, used=DESC + 0x800)
        other = BlockDriver(rig.transport, rig.memory, size=SIZE, index=1)
        other.setup_queue(desc=desc, avail=avail, used=used)
        rig.driver.set(Register.STATUS, rig.driver.status | 4)
        return rig

    return set_up


FREE = DESC + 0x1000


@pytest.mark.parametrize(
    ("features", "desc", "avail", "used"),
    [
        (SPLIT, FREE, FREE + 0x400, DESC),
        (SPLIT, FREE, FREE + 0x400, DESC + 0x400),
        (SPLIT, FREE, FREE + 0x400, DESC + 0x800),
        (SPLIT, FREE, DESC + 0x800, FREE + 0x400),
        (SPLIT, DESC + 0x800, FREE, FREE + 0x400),
        (PACKED, DESC, FREE, FREE + 4),
        (PACKED, FREE, DESC + 252, FREE + 0x400),
        (PACKED, FREE, DESC + 0x800, FREE + 0x400),
        (PACKED, FREE, FREE + 0x400, DESC + 0x400),
    ],
)
def test_fault_10_what_the_device_writes_in_another_queue(
    new_rig: MakeRig, features: int, desc: int, avail: int, used: int
) -> None:
    rig = two_queues(new_rig, features)(desc, avail, used)
    assert rig.driver.needs_reset
    assert "of another queue" in rig.reports[0]
    rig.assert_works()


@pytest.mark.parametrize(
    ("features", "desc", "avail", "used"),
    [
        (SPLIT, DESC + 0x100, DESC + 0x426, DESC + 0x888),
        (PACKED, DESC + 0x100, DESC + 0x404, DESC + 0x804),
        (SPLIT, DESC, DESC + 0x400, FREE),  # odd, but the device only reads there
    ],
)
def test_fault_10_two_queues_that_touch(
    new_rig: MakeRig, features: int, desc: int, avail: int, used: int
) -> None:
    rig = two_queues(new_rig, features)(desc, avail, used)
    assert rig.driver.status == 15
    assert not rig.reports


def test_fault_10_a_queue_set_up_anew_in_another(new_rig: MakeRig) -> None:
    features = SPLIT | int(Feature.RING_RESET)
    rig = two_queues(new_rig, features)(FREE, FREE + 0x400, FREE + 0x800)
    other = BlockDriver(rig.transport, rig.memory, size=SIZE, index=1)
    other.set(Register.QUEUE_SEL, 1)
    other.set(Register.QUEUE_RESET, 1)
    other.setup_queue(desc=DESC, avail=FREE + 0x400, used=FREE + 0x800)
    assert not rig.driver.needs_reset
    other.set(Register.QUEUE_RESET, 1)
    other.setup_queue(desc=FREE, avail=FREE + 0x400, used=DESC + 0x40)
    assert rig.driver.needs_reset


def test_a_queue_that_is_not_ready_is_in_nobodys_way() -> None:
    memory = GuestMemory.over(bytearray(1 << 16), RAM_BASE)
    other = queue_at(DESC, DESC + 0x400, DESC + 0x800)
    queue = queue_at(FREE, FREE + 0x400, DESC + 0x800)
    make_ring(queue, memory, SPLIT, [other, queue])
    other.ready = queue.ready = True
    with pytest.raises(RingError, match="overlaps the used ring of another queue"):
        make_ring(queue, memory, SPLIT, [other, queue])
