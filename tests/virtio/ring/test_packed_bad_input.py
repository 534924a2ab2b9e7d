"""Packed rings: the bad inputs of queue set-up and of rings."""

from __future__ import annotations

import time

import pytest

from pyvmm.virtio.spec import Feature, Register
from tests.support.packed_driver import (
    AVAIL,
    FEATURES,
    USED,
    PackedDriver,
    assert_refused,
    flush_chain,
    new_driver,
    read_chain,
)
from tests.support.patience import patient
from tests.support.rig import RAM_BYTES, Rig
from tests.support.virtio_driver import (
    INDIRECT,
    NEXT,
    RAM_BASE,
    STATUS_POISON,
    WRITE,
    Descriptor,
    readable,
    writable,
)
from tests.virtio.conftest import MakeRig

pytestmark = pytest.mark.usefixtures("both_paths", "both_pages")

RAM_END = RAM_BASE + RAM_BYTES
IN, OUT = 0, 1
SIZE = 16


@pytest.fixture
def driver(new_rig: MakeRig, rig: Rig) -> PackedDriver:
    """A running packed driver of 16 slots, on the device of ``rig``."""
    driver = new_driver(rig)
    driver.start()
    return driver


# Queue set-up


@pytest.fixture
def negotiated(new_rig: MakeRig) -> tuple[Rig, PackedDriver]:
    """A device at FEATURES_OK, with a packed ring to come."""
    rig = new_rig()
    driver = new_driver(rig)
    driver.negotiate()
    return rig, driver


def assert_set_up_refused(rig: Rig, driver: PackedDriver) -> None:
    assert driver.reg(Register.QUEUE_READY) == 0
    driver.set(Register.STATUS, 15)
    assert_refused(rig, driver)


@pytest.mark.parametrize("size", [0, 17, 0x8000, 0x1_0000, 0xFFFF_FFFF])
def test_bad_input_1_and_3_packed_size(negotiated: tuple[Rig, PackedDriver], size: int) -> None:
    negotiated[1].setup_queue(size=size)
    assert_set_up_refused(*negotiated)


def test_bad_input_2_packed_size_needs_not_be_a_power_of_2(
    negotiated: tuple[Rig, PackedDriver],
) -> None:
    negotiated[1].setup_queue(size=11)
    assert negotiated[1].reg(Register.QUEUE_READY) == 1
    assert not negotiated[1].needs_reset


@pytest.mark.parametrize("missing", [Register.QUEUE_DESC_LOW, Register.QUEUE_DRIVER_LOW])
def test_bad_input_5_packed_ready_without_addresses(
    negotiated: tuple[Rig, PackedDriver], missing: int
) -> None:
    driver = negotiated[1]
    driver.set(Register.QUEUE_NUM, SIZE)
    for register, gpa in (
        (Register.QUEUE_DESC_LOW, driver.desc),
        (Register.QUEUE_DRIVER_LOW, driver.avail),
        (Register.QUEUE_DEVICE_LOW, driver.used),
    ):
        if register != missing:
            driver.set(register, gpa)
    driver.set(Register.QUEUE_READY, 1)
    assert_set_up_refused(*negotiated)


@pytest.mark.parametrize(
    ("area", "by"), [("desc", 8), ("desc", 1), ("avail", 1), ("avail", 2), ("used", 2)]
)
def test_bad_input_6_7_8_packed_areas_not_aligned(
    negotiated: tuple[Rig, PackedDriver], area: str, by: int
) -> None:
    negotiated[1].setup_queue(**{area: RAM_BASE + 0x4000 + by})  # type: ignore[arg-type]
    assert_set_up_refused(*negotiated)


@pytest.mark.parametrize("area", ["desc", "avail", "used"])
@pytest.mark.parametrize("gpa", [0, RAM_BASE - 16, RAM_END, 1 << 40, 2**64 - 16])
def test_bad_input_9_and_12_packed_areas_outside_ram(
    negotiated: tuple[Rig, PackedDriver], area: str, gpa: int
) -> None:
    negotiated[1].setup_queue(**{area: gpa})  # type: ignore[arg-type]
    assert_set_up_refused(*negotiated)


def test_packed_areas_may_end_with_ram(negotiated: tuple[Rig, PackedDriver]) -> None:
    _, driver = negotiated
    driver.setup_queue(desc=RAM_END - 16 * SIZE - 16, avail=RAM_END - 8, used=RAM_END - 4)
    assert driver.reg(Register.QUEUE_READY) == 1


# Malformed chains


def submit_raw(driver: PackedDriver, descriptors: list[Descriptor]) -> None:
    """``descriptors`` exactly as they are but for their owner bits, and a notification."""
    driver.place_raw(descriptors, 0)
    driver.notify()


def test_bad_input_27_packed_chain_that_goes_round_the_ring(rig: Rig, driver: PackedDriver) -> None:
    header, _ = flush_chain(driver)
    driver.submit([header])  # so that the loop crosses the end
    driver.reap()
    for slot in range(SIZE):
        owner = AVAIL if slot else USED
        driver.write_slot(slot, header._replace(flags=NEXT), 0, owner)
    driver.notify()
    assert_refused(rig, driver)


def test_bad_input_27_the_longest_packed_loop_ends_in_time(new_rig: MakeRig) -> None:
    rig = new_rig(queue_size=1024)
    driver = new_driver(rig, 1024)
    driver.start()
    header, _ = flush_chain(driver)
    for slot in range(1024):
        driver.write_slot(slot, header._replace(flags=NEXT), 0, AVAIL)
    start = time.thread_time()
    driver.notify()
    assert time.thread_time() - start < patient(0.1)
    assert driver.needs_reset


@pytest.mark.parametrize("owner", [0, USED, AVAIL | USED])
def test_bad_input_26_packed_chain_into_a_slot_that_is_not_available(
    rig: Rig, driver: PackedDriver, owner: int
) -> None:
    header, status = flush_chain(driver)
    driver.write_slot(1, status, 0, owner)
    driver.write_slot(0, header._replace(flags=NEXT), 0, AVAIL)
    driver.notify()
    assert driver.memory.read_int(status.gpa, 1) == STATUS_POISON
    assert_refused(rig, driver)


@pytest.mark.parametrize("indirect", [False, True])
def test_bad_input_29_packed_chain_as_long_as_the_queue(
    driver: PackedDriver, indirect: bool
) -> None:
    for _ in range(3):
        chain, data, status = read_chain(driver, SIZE - 2)
        assert len(chain) == SIZE
        if indirect:
            chain = [driver.indirect(chain)]
        assert driver.ask(chain, status, data, 512) == (0, 513, b"\3" * 512)


def test_bad_input_30_packed_chain_longer_than_the_queue(rig: Rig, driver: PackedDriver) -> None:
    chain, _, status = read_chain(driver, SIZE - 1)
    assert len(chain) == SIZE + 1
    submit_raw(driver, [driver.indirect(chain)])
    assert driver.memory.read_int(status, 1) == STATUS_POISON
    assert_refused(rig, driver)


def test_bad_input_30_more_descriptors_in_a_table_than_a_packed_queue_has(new_rig: MakeRig) -> None:
    rig = new_rig()
    driver = new_driver(rig, 2)
    driver.start()
    submit_raw(driver, [driver.indirect(read_chain(driver, 15)[0])])
    assert driver.reap() == []
    assert driver.needs_reset
    rig.assert_works()


@pytest.mark.parametrize("pieces", [1, 2])
def test_bad_input_32_packed_indirect_that_was_not_negotiated(
    rig: Rig, driver: PackedDriver, pieces: int
) -> None:
    driver.start(FEATURES & ~Feature.INDIRECT_DESC)
    chain, _, status = read_chain(driver, pieces)
    submit_raw(driver, [driver.indirect(chain)])
    assert driver.memory.read_int(status, 1) == STATUS_POISON
    assert_refused(rig, driver)


@pytest.mark.parametrize("place", [0, 1])
def test_bad_input_33_packed_indirect_in_a_chain(
    rig: Rig, driver: PackedDriver, place: int
) -> None:
    header, status = flush_chain(driver)
    indirect = driver.indirect([header, status])
    if place == 0:
        submit_raw(driver, [indirect._replace(flags=INDIRECT | NEXT), status])
    else:
        submit_raw(driver, [header._replace(flags=NEXT), indirect])
    assert_refused(rig, driver)


def test_bad_input_34_flags_in_a_packed_indirect_table_but_write_are_ignored(
    driver: PackedDriver,
) -> None:
    chain, data, status = read_chain(driver, 1)
    chain = [d._replace(flags=d.flags | 0xFFFD) for d in chain]
    assert driver.ask([driver.indirect(chain)], status, data, 512) == (0, 513, b"\3" * 512)


@pytest.mark.parametrize("length", [0, 1, 15, 17, 47, 49, 0xFFFF_FFFF, 0xFFFF_FFF0])
def test_bad_input_35_packed_indirect_table_of_no_or_broken_length(
    rig: Rig, driver: PackedDriver, length: int
) -> None:
    submit_raw(driver, [driver.indirect(flush_chain(driver))._replace(length=length)])
    assert_refused(rig, driver)


@pytest.mark.parametrize("gpa", [0, RAM_BASE - 16, RAM_END - 32, 2**64 - 16, 2**63])
def test_bad_input_35_packed_indirect_table_outside_ram(
    rig: Rig, driver: PackedDriver, gpa: int
) -> None:
    submit_raw(driver, [Descriptor(gpa, 48, INDIRECT)])
    assert_refused(rig, driver)


def test_bad_input_35_packed_indirect_table_below_ram_is_not_the_end_of_ram(
    rig: Rig, driver: PackedDriver
) -> None:
    chain, _, status = read_chain(driver, 1)
    table = driver.indirect(chain)
    driver.memory.write(RAM_END - 48, driver.memory.read(table.gpa, 48))
    submit_raw(driver, [table._replace(gpa=RAM_BASE - 48)])
    assert driver.memory.read_int(status, 1) == STATUS_POISON
    assert_refused(rig, driver)


@pytest.mark.parametrize("indirect", [False, True])
def test_bad_input_37_undefined_packed_flag_bits_are_ignored(
    driver: PackedDriver, indirect: bool
) -> None:
    undefined = 0xFFFF & ~(AVAIL | USED | NEXT | WRITE | INDIRECT)
    chain, data, status = read_chain(driver, 1)
    if indirect:
        chain = [driver.indirect(chain)]
    chain = [d._replace(flags=d.flags | undefined) for d in chain]
    if indirect:
        chain[0] = chain[0]._replace(flags=chain[0].flags | WRITE)  # ignored by 2.8.7 too
    assert driver.ask(chain, status, data, 512) == (0, 513, b"\3" * 512)


@pytest.mark.parametrize("indirect", [False, True])
def test_bad_input_38_packed_readable_after_writable(
    rig: Rig, driver: PackedDriver, indirect: bool
) -> None:
    header, status = flush_chain(driver)
    chain = [status, header]
    driver.submit([driver.indirect(chain)] if indirect else chain)
    assert driver.memory.read_int(status.gpa, 1) == STATUS_POISON
    assert_refused(rig, driver)


@pytest.mark.parametrize("flags", [0, WRITE])
def test_bad_input_39_empty_packed_descriptors_are_skipped(
    driver: PackedDriver, flags: int
) -> None:
    chain, data, status = read_chain(driver, 2)
    place = 1 if flags == 0 else 2
    chain[place:place] = [Descriptor(2**64 - 1, 0, flags)] * 2
    chain += [Descriptor(0, 0, WRITE)]
    assert driver.ask(chain, status, data, 512) == (0, 513, b"\3" * 512)


@pytest.mark.parametrize("request_type", [IN, OUT])
@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (RAM_BASE, 2**32 - 1),
        (2**64 - 256, 512),
        (2**63, 512),
        (RAM_END - 256, 512),
        (RAM_BASE - 256, 512),
    ],
)
def test_bad_input_40_41_42_packed_data_outside_ram(
    rig: Rig, driver: PackedDriver, request_type: int, gpa: int, length: int
) -> None:
    disk, status = rig.disk, driver.status_byte()
    data = Descriptor(gpa, length, WRITE if request_type == IN else 0)
    header = readable(driver.header(request_type), 16)
    assert driver.ask([header, data, writable(status, 1)], status) == (1, 1, b"")
    assert rig.disk == disk
    assert not driver.needs_reset


def test_packed_chains_before_a_malformed_one_are_returned(rig: Rig, driver: PackedDriver) -> None:
    chain, data, _ = read_chain(driver, 1)
    driver.place(chain, 3)
    driver.place_raw([Descriptor(0, 16, INDIRECT)], 4)
    driver.notify()
    assert driver.reap() == [(3, 513)]
    assert driver.memory.read(data, 512) == b"\3" * 512
    assert_refused(rig, driver)
