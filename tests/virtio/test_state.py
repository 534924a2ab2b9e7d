"""``save`` and ``restore`` of a block device behind virtio-mmio, in every state it can be in.

What a random driver does between is test_ring_model.py's to find out; states that are no state are
test_state_bad_input.py's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.errors import StateError
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.ring.rings import make_ring
from pyvmm.virtio.spec import BlockFeature, Feature, InterruptBit, Register, Status
from tests.support.packed_driver import PackedDriver
from tests.support.rig import DISK_SECTORS, Rig, make_rig
from tests.support.virtio_driver import BlockDriver, readable, writable
from tests.support.virtio_states import assert_plain

IN, OUT = 0, 1
BASE = int(Feature.VERSION_1 | Feature.RING_RESET | BlockFeature.FLUSH | BlockFeature.CONFIG_WCE)


class Forward:
    """The registers of whichever transport there is now."""

    def __init__(self, transport: MmioTransport) -> None:
        self.transport = transport

    def read(self, offset: int, size: int) -> int:
        return self.transport.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.transport.write(offset, size, value)


class Saved:
    """A rig whose device can be replaced by another in the same state."""

    def __init__(self, path: Path, config: BlockConfig, *, keep_used: bool = False) -> None:
        self.rig: Rig = make_rig(path, config=config, keep_used=keep_used)
        self.config = config
        self.keep_used = keep_used
        self.memory, self.irqs = self.rig.memory, self.rig.irqs
        self.transport = self.rig.transport
        self.device = self.rig.device
        self.registers = Forward(self.transport)
        self.now_s = 50.0

    def another(self) -> MmioTransport:
        """A fresh transport of the same configuration."""
        self.device = BlockDevice(self.config, self.rig.backend, clock=lambda: self.now_s)
        return MmioTransport(
            self.device, self.memory, lambda: self.irqs.append(0), report=self.rig.reports.append,
            keep_used=self.keep_used,
        )

    def go_on_in_another(self) -> None:
        """Save, and let another device go on from there: all that can be seen is the same."""
        state, page, ram = self.transport.save(), bytes(self.transport.page), bytes(self.rig.ram)
        irqs = len(self.irqs)
        assert_plain(state)
        assert self.transport.save() == state, "saving changes nothing"
        self.transport.close()
        self.transport = self.registers.transport = self.another()
        self.transport.restore(state)
        assert self.transport.save() == state
        assert bytes(self.transport.page) == page
        assert bytes(self.rig.ram) == ram
        assert len(self.irqs) == irqs

    def close(self) -> None:
        self.transport.close()
        self.rig.backend.close()


MakeSaved = Callable[..., Saved]


@pytest.fixture
def new_saved(tmp_path: Path) -> Iterator[MakeSaved]:
    made: list[Saved] = []

    def make(config: BlockConfig | None = None, *, keep_used: bool = False) -> Saved:
        config = config or BlockConfig(queue_size=64)
        made.append(Saved(tmp_path / "disk.img", config, keep_used=keep_used))
        return made[-1]

    yield make
    for saved in made:
        saved.close()


RINGS = [
    (kind, size, event_idx, in_order, indirect)
    for kind, sizes in (("split", (4, 64)), ("packed", (5, 64)))
    for size, event_idx, in_order, indirect in itertools.product(sizes, *[(False, True)] * 3)
]


@pytest.mark.parametrize(("kind", "size", "event_idx", "in_order", "indirect"), RINGS)
def test_requests_that_wait_are_served_by_the_next_device(
    new_saved: MakeSaved, kind: str, size: int, event_idx: bool, in_order: bool, indirect: bool
) -> None:
    saved = new_saved()
    features = BASE
    for feature, chosen in (
        (Feature.RING_PACKED, kind == "packed"), (Feature.EVENT_IDX, event_idx),
        (Feature.IN_ORDER, in_order), (Feature.INDIRECT_DESC, indirect),
    ):
        features |= int(feature) if chosen else 0
    drivers = PackedDriver if kind == "packed" else BlockDriver
    driver = drivers(saved.registers, saved.memory, size=size)
    driver.start(features)
    for number in range(3 * size):  # over the ring's end, in both laps
        sector = number % DISK_SECTORS
        data = bytes([number % 251]) * 512
        with driver.scratch():
            status = driver.status_byte()
            chain = [readable(driver.header(OUT, sector), 16), readable(driver.put(data), 512),
                     writable(status, 1)]  # fmt: skip
            driver.place([driver.indirect(chain)] if indirect else chain)
            if number % 5 == 0:
                saved.go_on_in_another()
            saved.transport.service(0)
            assert len(driver.reap()) == 1
            assert saved.memory.read_int(status, 1) == 0
        assert driver.request(IN, sector, room=512, indirect=indirect) == (0, 513, data)
        if number % 7 == 0:
            saved.go_on_in_another()
    assert not driver.needs_reset
    assert saved.rig.reports == []


@pytest.mark.parametrize("keep_used", [False, True])
def test_every_step_of_a_driver_can_be_saved(new_saved: MakeSaved, keep_used: bool) -> None:
    saved = new_saved(keep_used=keep_used)
    driver = BlockDriver(saved.registers, saved.memory, size=16)
    saved.go_on_in_another()
    for status in (1, 3):
        driver.set(Register.STATUS, status)
        saved.go_on_in_another()
    driver.set(Register.DEVICE_FEATURES_SEL, 1)
    driver.set(Register.DRIVER_FEATURES_SEL, 7)
    driver.set(Register.DRIVER_FEATURES, 5)
    saved.go_on_in_another()
    assert driver.reg(Register.DEVICE_FEATURES) == saved.device.avail_features >> 32
    for word in (0, 1, 2):
        driver.set(Register.DRIVER_FEATURES_SEL, word)
        driver.set(Register.DRIVER_FEATURES, BASE >> 32 * word & 0xFFFF_FFFF)
        saved.go_on_in_another()
    driver.set(Register.STATUS, 11)
    assert driver.status == 11
    saved.go_on_in_another()
    driver.setup_queue(ready=False)
    saved.go_on_in_another()
    driver.set(Register.QUEUE_READY, 1)
    saved.go_on_in_another()
    driver.set(Register.QUEUE_SEL, 9)
    saved.go_on_in_another()
    driver.set(Register.STATUS, 15)
    saved.go_on_in_another()
    assert driver.request(IN, 3, room=512).status == 0
    saved.go_on_in_another()
    driver.set(Register.STATUS, 15 | Status.FAILED)
    saved.go_on_in_another()
    driver.set(Register.STATUS, 0)
    saved.go_on_in_another()
    driver.start(BASE)
    assert driver.request(IN, 3, room=512).status == 0


@pytest.mark.parametrize("keep_used", [False, True])
def test_an_interrupt_that_is_not_acknowledged_stays_so(
    new_saved: MakeSaved, keep_used: bool
) -> None:
    saved = new_saved(keep_used=keep_used)
    driver = BlockDriver(saved.registers, saved.memory, size=16)
    driver.start(BASE)
    driver.request(IN, 0, room=512)
    saved.transport.config_changed()
    saved.go_on_in_another()
    bits = InterruptBit.USED_BUFFER | InterruptBit.CONFIG_CHANGE
    assert driver.reg(Register.INTERRUPT_STATUS) == bits
    driver.set(Register.INTERRUPT_ACK, int(bits))
    kept = InterruptBit.USED_BUFFER if keep_used else 0
    assert driver.reg(Register.INTERRUPT_STATUS) == kept
    saved.go_on_in_another()
    assert driver.reg(Register.INTERRUPT_STATUS) == kept


def test_a_device_that_has_stopped_stays_so_until_it_is_reset(new_saved: MakeSaved) -> None:
    saved = new_saved()
    driver = BlockDriver(saved.registers, saved.memory, size=16)
    driver.start(BASE)
    driver.offer(99)
    driver.notify()
    assert driver.needs_reset
    saved.go_on_in_another()
    assert driver.needs_reset
    driver.start(BASE)
    saved.go_on_in_another()
    assert driver.request(IN, 3, room=512).status == 0


def test_a_queue_that_was_malformed_at_the_start_stays_unserved(new_saved: MakeSaved) -> None:
    """DRIVER_OK was written, and the device did not become active."""
    saved = new_saved()
    driver = BlockDriver(saved.registers, saved.memory, size=16)
    for status in (0, 1, 3):
        driver.set(Register.STATUS, status)
    # Before the features, so it is looked at as a split ring: a packed one needs 4 bytes there.
    driver.setup_queue(avail=driver.avail + 2)
    driver.accept(BASE | int(Feature.RING_PACKED))
    driver.set(Register.STATUS, 11)
    driver.set(Register.STATUS, 15)
    assert driver.needs_reset
    assert not saved.device.is_activated
    saved.go_on_in_another()
    assert driver.needs_reset
    assert not saved.device.is_activated


def test_a_queue_alone_can_be_reset_and_set_up_after_a_restore(new_saved: MakeSaved) -> None:
    saved = new_saved()
    driver = BlockDriver(saved.registers, saved.memory, size=16)
    driver.start(BASE)
    driver.request(IN, 0, room=512)
    driver.set(Register.QUEUE_RESET, 1)
    saved.go_on_in_another()
    assert driver.reg(Register.QUEUE_READY) == 0
    driver.restart()
    driver.setup_queue()
    assert driver.reg(Register.QUEUE_READY) == 1
    saved.go_on_in_another()
    assert driver.request(IN, 3, room=512).status == 0
    driver.set(Register.QUEUE_READY, 0)  # stopped, not reset
    saved.go_on_in_another()
    driver.setup_queue()
    assert driver.reg(Register.QUEUE_READY) == 0


def test_the_cache_mode_that_the_driver_chose_is_kept(new_saved: MakeSaved) -> None:
    saved = new_saved()
    driver = BlockDriver(saved.registers, saved.memory, size=16)
    driver.start(BASE)
    saved.registers.write(Register.CONFIG + 32, 1, 0)
    generation = driver.reg(Register.CONFIG_GENERATION)
    saved.go_on_in_another()
    assert saved.registers.read(Register.CONFIG + 32, 1) == 0
    assert driver.reg(Register.CONFIG_GENERATION) == generation > 0


def test_a_request_that_a_rate_limit_holds_is_served_by_the_next_device(
    new_saved: MakeSaved,
) -> None:
    config = BlockConfig(queue_size=64, rate_limit=RateLimit(ops_per_s=10, ops_burst=2))
    saved = new_saved(config)
    saved.transport.close()
    saved.transport = saved.registers.transport = saved.another()
    driver = BlockDriver(saved.registers, saved.memory, size=16)
    driver.start(BASE)
    statuses = []
    for head in range(0, 12, 3):
        statuses.append(driver.status_byte())
        chain = [readable(driver.header(IN, head), 16), writable(driver.alloc(512), 512)]
        driver.place([*chain, writable(statuses[-1], 1)], head)
    driver.notify()
    assert [used.head for used in driver.reap()] == [0, 3]
    saved.device.set_rate_limit(RateLimit(ops_per_s=20, ops_burst=2))
    saved.go_on_in_another()
    assert saved.transport.service(0) == pytest.approx(0.05), "the tokens were not given anew"
    saved.go_on_in_another()
    saved.now_s += 0.05
    saved.transport.service(0)
    assert [used.head for used in driver.reap()] == [6]
    saved.device.set_rate_limit(RateLimit())
    saved.go_on_in_another()
    assert saved.transport.service(0) is None, "no limit is a state too"
    assert [used.head for used in driver.reap()] == [9]


def test_a_used_device_takes_a_state_as_well(new_saved: MakeSaved) -> None:
    """As in going back to a snapshot: nothing of what was since is left."""
    saved = new_saved()
    driver = BlockDriver(saved.registers, saved.memory, size=16)
    driver.start(BASE)
    driver.request(IN, 0, room=512)
    state, ram = saved.transport.save(), bytes(saved.rig.ram)
    idx = driver.avail_idx
    for sector in range(5):
        driver.request(IN, sector, room=512)
    saved.rig.ram[:] = ram
    driver.avail_idx = driver.used_idx = idx
    saved.transport.restore(state)
    assert saved.transport.save() == state
    assert driver.request(IN, 3, room=512).status == 0


def test_a_disk_of_another_size_is_refused(new_saved: MakeSaved) -> None:
    saved = new_saved()
    state = saved.transport.save()
    with saved.rig.path.open("ab") as file:
        file.write(bytes(512))
    saved.device.refresh()
    with pytest.raises(StateError, match="capacity_sectors is 64, the disk has 65"):
        saved.transport.restore(state)


@pytest.mark.parametrize("features", [BASE, BASE | int(Feature.RING_PACKED)])
def test_chains_that_nobody_will_push_stay_between_the_indices(
    new_saved: MakeSaved, features: int
) -> None:
    """A ring that began ahead of what is used (vhost-user), saved."""
    saved = new_saved()
    is_packed = bool(features & Feature.RING_PACKED)
    kind = PackedDriver if is_packed else BlockDriver
    driver = kind(saved.registers, saved.memory, size=16)
    driver.start(features)
    queue = saved.device.queues[0]
    queue.base = 0x8000 << 16 | 0x8004 if is_packed else 4
    ring = make_ring(queue, saved.memory, features)
    state = ring.save()
    queue.base = None
    other = make_ring(queue, saved.memory, features)
    other.restore(state)
    assert other.save() == state
    assert other.base == ring.base
    other.untake()
    assert other.base == ring.base
