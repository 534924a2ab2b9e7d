"""Packed rings, driven through the registers: what has to work."""

from __future__ import annotations

import pytest

from tests.support.packed_driver import PackedDriver, flush_chain, new_driver, read_chain
from tests.support.rig import Hooked, Rig
from tests.support.virtio_driver import NEXT, readable
from tests.virtio.conftest import MakeRig

IN, OUT, FLUSH = 0, 1, 4
SIZE = 16


@pytest.fixture
def driver(new_rig: MakeRig, rig: Rig) -> PackedDriver:
    """A running packed driver of 16 slots, on the device of ``rig``."""
    driver = new_driver(rig)
    driver.start()
    return driver


@pytest.mark.parametrize("indirect", [False, True])
def test_requests_of_every_shape_are_served(rig: Rig, driver: PackedDriver, indirect: bool) -> None:
    assert driver.request(IN, 7, room=512, indirect=indirect) == (0, 513, b"\7" * 512)
    assert driver.request(OUT, 7, data=b"x" * 1024, indirect=indirect) == (0, 1, b"")
    assert driver.request(FLUSH, indirect=indirect) == (0, 1, b"")
    assert rig.disk[7 * 512 : 9 * 512] == b"x" * 1024
    chain, data, status = read_chain(driver, 5)
    answer = driver.ask([driver.indirect(chain)] if indirect else chain, status, data, 512)
    assert answer == (0, 513, b"\3" * 512)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 7, 12, 16])
def test_ring_of_any_size_goes_round_and_round(new_rig: MakeRig, size: int) -> None:
    rig = new_rig()
    driver = new_driver(rig, size)
    driver.start()
    for i in range(5 * size):
        pieces = 1 + i % max(1, min(size - 2, 3))
        chain, data, status = read_chain(driver, pieces)
        if len(chain) > size or i % 5 == 4:
            chain = [driver.indirect(chain)]
            if size < 3:  # too long even so
                chain = [driver.indirect([readable(driver.header(77), 16)])]
        driver.submit(chain, head=i)
        expected = 513 if size >= 3 else 0
        assert driver.reap() == [(i, expected)]
        if expected:
            assert driver.memory.read(data, 512) == b"\3" * 512
            assert driver.memory.read_int(status, 1) == 0
        driver._top = driver.used + 64
    assert driver.wrap in (0, 1)
    assert not driver.needs_reset


def test_a_batch_is_returned_in_order_with_one_interrupt(rig: Rig, driver: PackedDriver) -> None:
    ids = [9, 0, 0xFFFF, 300, 4]
    for buffer_id in ids[:4]:
        driver.place(flush_chain(driver), buffer_id)
    chain, data, _ = read_chain(driver, 2)
    driver.place([driver.indirect(chain)], ids[4])
    driver.notify()
    assert driver.reap() == [(i, 1) for i in ids[:4]] + [(4, 513)]
    assert driver.memory.read(data, 512) == b"\3" * 512
    assert len(rig.irqs) == 1
    driver.notify()  # nothing new: nothing to tell
    assert len(rig.irqs) == 1


def test_a_full_ring_is_served_in_one_pass(rig: Rig, driver: PackedDriver) -> None:
    for _ in range(3):
        for i in range(8):
            driver.place(flush_chain(driver), i)
        driver.notify()
        assert driver.reap() == [(i, 1) for i in range(8)]
    assert len(rig.irqs) == 3


def test_the_buffer_id_is_the_last_descriptors(rig: Rig, driver: PackedDriver) -> None:
    for chain in (flush_chain(driver), read_chain(driver, 1)[0]):
        first, owner = driver.slot, driver.owner
        driver.place(chain, 7)
        for slot, d in enumerate(chain[:-1], first):
            driver.write_slot(slot, d._replace(flags=d.flags | NEXT), 0xBAD, owner)
        driver.notify()
        assert [used.head for used in driver.reap()] == [7]


def test_available_descriptors_of_the_previous_lap_are_not_taken_again(
    rig: Rig, driver: PackedDriver
) -> None:
    for _ in range(4):
        driver.submit(flush_chain(driver))
        assert driver.reap() == [(0, 1)]
    for _ in range(5):
        assert rig.transport.service(0) is None
    assert driver.reap() == []


def test_work_that_arrives_during_the_pass_is_bounded(hooked: tuple[Rig, Hooked]) -> None:
    rig, backend = hooked
    driver = new_driver(rig)
    driver.start()
    chain = [driver.indirect(flush_chain(driver))]
    flushes = 0

    def flush() -> None:
        nonlocal flushes
        flushes += 1
        driver.place(chain, 1)  # even over slots that were not given back

    backend.flush = flush  # type: ignore[method-assign]
    driver.place(chain, 1)
    driver.place(chain, 1)  # a pass that begins with a single one looks for no other
    rig.transport.service(0)
    assert flushes == SIZE
    assert not driver.needs_reset
    rig.assert_works()
