"""Who tells whom, and when: notifications and interrupts of both kinds of ring, with and without
VIRTIO_F_EVENT_IDX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from pyvmm.virtio.spec import BlockFeature, EventFlags, Feature
from tests.support.packed_driver import PackedDriver
from tests.support.rig import Hooked, Rig
from tests.support.virtio_driver import BlockDriver, Descriptor, readable, writable

FLUSH = 4
SIZE = 16
BASE = int(Feature.VERSION_1 | Feature.INDIRECT_DESC | BlockFeature.FLUSH)
KINDS = ["split", "packed"]


def start(rig: Rig, kind: str, *, event_idx: bool, size: int = SIZE) -> BlockDriver:
    """A running driver with that kind of ring."""
    features = BASE | (Feature.EVENT_IDX if event_idx else 0)
    driver = BlockDriver(rig.transport, rig.memory, size=size)
    if kind == "packed":
        driver = PackedDriver(rig.transport, rig.memory, size=size)
        features |= Feature.RING_PACKED
    driver.start(int(features))
    rig.driver = driver
    return driver


def flush_chain(driver: BlockDriver) -> list[Descriptor]:
    """A flush request in one slot."""
    return [
        driver.indirect([readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)])
    ]


def flush(driver: BlockDriver, *heads: int) -> None:
    """Flush requests, offered together and announced."""
    for head in heads:
        driver.place(flush_chain(driver), head)
    driver.notify()
    assert [used.head for used in driver.reap()] == list(heads)


# Interrupts: what the driver asks for


@pytest.mark.parametrize("kind", KINDS)
def test_no_interrupt_when_the_driver_wants_none(rig: Rig, kind: str) -> None:
    driver = start(rig, kind, event_idx=False)
    before = len(rig.irqs)
    driver.want_interrupts(False)
    flush(driver, 0, 1)
    assert len(rig.irqs) == before
    driver.want_interrupts(True)
    flush(driver, 0, 1)
    assert len(rig.irqs) == before + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_pass_with_nothing_to_do_does_not_interrupt(rig: Rig, kind: str, event_idx: bool) -> None:
    driver = start(rig, kind, event_idx=event_idx)
    before = len(rig.irqs)
    for _ in range(3):
        driver.notify()
    assert len(rig.irqs) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [4, 16])
def test_event_idx_interrupts_exactly_where_the_driver_said(rig: Rig, kind: str, size: int) -> None:
    driver = start(rig, kind, event_idx=True, size=size)
    before = len(rig.irqs)
    for wanted in [1, 2, 3, 4] * 20:  # several times around the ring
        driver.interrupt_after(wanted)
        for done in range(1, 5):
            flush(driver, 0)
            assert len(rig.irqs) - before == (done >= wanted)
        before = len(rig.irqs)


@pytest.mark.parametrize("kind", KINDS)
def test_event_idx_is_crossed_by_a_batch(rig: Rig, kind: str) -> None:
    driver = start(rig, kind, event_idx=True)
    for wanted, batch, interrupts in [(1, 4, 1), (4, 4, 1), (5, 4, 0), (2, 16, 1), (16, 16, 1)]:
        driver.interrupt_after(wanted)
        before = len(rig.irqs)
        flush(driver, *range(batch))
        assert len(rig.irqs) - before == interrupts


def test_split_event_idx_works_across_65536(hooked: tuple[Rig, Hooked]) -> None:
    rig, backend = hooked
    backend.flush = lambda: None  # type: ignore[method-assign]
    driver = start(rig, "split", event_idx=True)
    chain = flush_chain(driver)
    for head in range(SIZE):
        driver.write_table(chain, head)
    driver.interrupt_after(65536)
    before = len(rig.irqs)
    for served in range(SIZE, 65536 + SIZE, SIZE):
        driver.offer(*range(SIZE))
        driver.notify()
        assert len(driver.reap()) == SIZE
        assert len(rig.irqs) - before == (served >= 65536)
    assert driver.avail_idx == 0
    driver.interrupt_after(1)
    flush(driver, 0)
    assert len(rig.irqs) == before + 2


def test_split_event_idx_ignores_the_flags(rig: Rig) -> None:
    # 2.7.7.2: "The device MUST ignore the lower bit of flags."
    driver = start(rig, "split", event_idx=True)
    driver.want_interrupts(False)
    driver.interrupt_after(1)
    before = len(rig.irqs)
    flush(driver, 0)
    assert len(rig.irqs) == before + 1


def test_packed_event_is_crossed_inside_a_chain(rig: Rig) -> None:
    driver = start(rig, "packed", event_idx=True)
    for _ in range(SIZE):
        driver.interrupt_after(2)  # the second slot of a chain of two
        before = len(rig.irqs)
        chain = [readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)]
        driver.submit(chain)
        assert driver.reap() == [(0, 1)]
        assert len(rig.irqs) == before + 1
        flush(driver, 0)
        assert len(rig.irqs) == before + 1


@pytest.mark.parametrize(
    ("event_idx", "flags", "interrupts"),
    [
        (True, EventFlags.ENABLE, 1),
        (True, EventFlags.DISABLE, 0),
        (True, 3, 1),
        (False, EventFlags.DESC, 1),  # "only valid if VIRTIO_F_EVENT_IDX has been negotiated"
        (False, 3, 1),
        (False, 0xFFFC | EventFlags.DISABLE, 0),  # reserved bits
    ],
)
def test_packed_event_flags(rig: Rig, event_idx: bool, flags: int, interrupts: int) -> None:
    driver = start(rig, "packed", event_idx=event_idx)
    assert isinstance(driver, PackedDriver)
    driver.set_driver_event(flags, slot=5, wrap=0)
    before = len(rig.irqs)
    flush(driver, 0)
    assert len(rig.irqs) - before == interrupts


@pytest.mark.parametrize("slot", [SIZE, SIZE + 1, 0x7FFF])
def test_packed_event_beyond_the_ring_is_survived(rig: Rig, slot: int) -> None:
    driver = start(rig, "packed", event_idx=True)
    assert isinstance(driver, PackedDriver)
    for wrap in (0, 1):
        driver.set_driver_event(EventFlags.DESC, slot=slot, wrap=wrap)
        flush(driver, *range(SIZE))
        flush(driver, 0)
    assert not driver.needs_reset


# Notifications: what the device asks for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_the_driver_is_kept_quiet_while_a_pass_is_under_way(
    hooked: tuple[Rig, Hooked], kind: str, event_idx: bool
) -> None:
    rig, backend = hooked
    driver = start(rig, kind, event_idx=event_idx)
    seen = []
    # The driver has to ask about what it has not yet offered when the device went to work.
    backend.flush = lambda: seen.append(driver.is_quiet())  # type: ignore[method-assign]
    for _ in range(3 * SIZE):
        assert not driver.is_quiet()
        for head in range(3):
            driver.place(flush_chain(driver), head)
        driver.notify()
        assert len(driver.reap()) == 3
        assert not driver.is_quiet()
    assert seen == [True] * 9 * SIZE


def test_split_event_idx_leaves_the_flags_0(hooked: tuple[Rig, Hooked]) -> None:
    # 2.7.10.2: with EVENT_IDX "the device MUST set flags to 0".
    rig, backend = hooked
    driver = start(rig, "split", event_idx=True)
    seen = []
    backend.flush = lambda: seen.append(  # type: ignore[method-assign]
        rig.memory.read_int(driver.used, 2)
    )
    flush(driver, 0, 1)
    assert seen == [0, 0]
    assert rig.memory.read_int(driver.used, 2) == 0


def test_split_without_event_idx_leaves_avail_event_alone(rig: Rig) -> None:
    driver = start(rig, "split", event_idx=False)
    flush(driver, 0, 1)
    assert rig.memory.read_int(driver.used + 4 + 8 * SIZE, 2) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_what_is_offered_during_the_pass_is_served_or_asked_for(
    hooked: tuple[Rig, Hooked], kind: str, event_idx: bool
) -> None:
    rig, backend = hooked
    driver = start(rig, kind, event_idx=event_idx)

    def offer_another() -> None:
        backend.flush = lambda: None  # type: ignore[method-assign]
        driver.place(flush_chain(driver), 5)

    backend.flush = offer_another  # type: ignore[method-assign]
    driver.place(flush_chain(driver), 3)
    # A split ring leaves it to another pass, a packed one finds it in this one.
    while rig.transport.service(0) is not None:
        pass
    assert [used.head for used in driver.reap()] == [3, 5]
    assert not driver.is_quiet()


# The race: each side stores, then looks.  What comes in between must not be lost.


@pytest.fixture
def at_fences(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Calls to make at the fences that come, one each: the other vCPU's doings at the moment
    between the device's store and its look."""
    script: list[Callable[[], None]] = []

    class Fence(contextlib.nullcontext[None]):
        def __enter__(self) -> None:
            if script:
                script.pop(0)()

    for kind in KINDS:
        monkeypatch.setattr(f"pyvmm.virtio.ring.{kind}.FullFence", Fence)
    return script


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_chain_offered_just_before_notifications_are_on_is_found(
    rig: Rig, at_fences: list[Callable[[], None]], kind: str, event_idx: bool
) -> None:
    driver = start(rig, kind, event_idx=event_idx)
    driver.place(flush_chain(driver), 3)
    at_fences += [lambda: None, lambda: driver.place(flush_chain(driver), 5)]
    assert rig.transport.service(0) == 0.0
    assert [used.head for used in driver.reap()] == [3]
    assert rig.transport.service(0) is None
    assert [used.head for used in driver.reap()] == [5]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupts_wanted_just_before_the_device_looks_are_sent(
    rig: Rig, at_fences: list[Callable[[], None]], kind: str
) -> None:
    driver = start(rig, kind, event_idx=False)
    driver.want_interrupts(False)
    at_fences.append(lambda: driver.want_interrupts(True))
    before = len(rig.irqs)
    flush(driver, 0)
    assert len(rig.irqs) == before + 1


@pytest.mark.parametrize("kind", KINDS)
def test_event_moved_just_before_the_device_looks_counts(
    rig: Rig, at_fences: list[Callable[[], None]], kind: str
) -> None:
    driver = start(rig, kind, event_idx=True)
    driver.interrupt_after(9)
    at_fences.append(lambda: driver.interrupt_after(1))
    before = len(rig.irqs)
    flush(driver, 0)
    assert len(rig.irqs) == before + 1
