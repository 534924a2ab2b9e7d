"""Virtqueue set-up through the registers: bad inputs 1-17."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyvmm.virtio.ring.queue import FullFence
from pyvmm.virtio.spec import Register
from tests.support.rig import RAM_BYTES, Rig
from tests.support.virtio_driver import RAM_BASE
from tests.virtio.conftest import MakeRig

RAM_END = RAM_BASE + RAM_BYTES


@pytest.fixture
def negotiated(new_rig: MakeRig) -> Rig:
    """A device at FEATURES_OK."""
    rig = new_rig()
    rig.driver.negotiate()
    return rig


def assert_refused(rig: Rig) -> None:
    """The queue set up last did not become ready, and the device needs a reset."""
    assert rig.driver.reg(Register.QUEUE_READY) == 0
    rig.driver.set(Register.STATUS, 15)
    rig.assert_needs_reset()


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_every_size_the_device_allows_is_taken(negotiated: Rig, size: int) -> None:
    negotiated.driver.setup_queue(size=size)
    assert negotiated.driver.reg(Register.QUEUE_READY) == 1
    assert not negotiated.driver.needs_reset


def test_rings_may_end_with_ram(negotiated: Rig) -> None:
    negotiated.driver.setup_queue(used=RAM_END - (6 + 8 * 16) - 2)
    assert negotiated.driver.reg(Register.QUEUE_READY) == 1
    assert not negotiated.driver.needs_reset


def test_bad_input_1_queue_size_0(negotiated: Rig) -> None:
    negotiated.driver.setup_queue(size=0)
    assert_refused(negotiated)


@pytest.mark.parametrize("size", [3, 5, 15])
def test_bad_input_2_queue_size_not_a_power_of_2(negotiated: Rig, size: int) -> None:
    negotiated.driver.setup_queue(size=size)
    assert_refused(negotiated)


@pytest.mark.parametrize("size", [17, 32, 0x8000, 0x1_0000, 0x1_0010, 0xFFFF_FFFF])
def test_bad_input_3_queue_size_above_the_maximum(negotiated: Rig, size: int) -> None:
    negotiated.driver.setup_queue(size=size)
    assert_refused(negotiated)


@pytest.mark.parametrize("missing", ["all", "desc", "avail", "used"])
def test_bad_input_5_ready_without_addresses(negotiated: Rig, missing: str) -> None:
    driver = negotiated.driver
    driver.set(Register.QUEUE_SEL, 0)
    driver.set(Register.QUEUE_NUM, 16)
    for name, register, gpa in (
        ("desc", Register.QUEUE_DESC_LOW, driver.desc),
        ("avail", Register.QUEUE_DRIVER_LOW, driver.avail),
        ("used", Register.QUEUE_DEVICE_LOW, driver.used),
    ):
        if missing not in ("all", name):
            driver.set(register, gpa)
    driver.set(Register.QUEUE_READY, 1)
    assert_refused(negotiated)


@pytest.mark.parametrize("by", [1, 2, 4, 8])
def test_bad_input_6_descriptor_table_not_aligned_to_16(negotiated: Rig, by: int) -> None:
    negotiated.driver.setup_queue(desc=RAM_BASE + 0x4000 + by)
    assert_refused(negotiated)


def test_bad_input_7_available_ring_not_aligned_to_2(negotiated: Rig) -> None:
    negotiated.driver.setup_queue(avail=RAM_BASE + 0x4001)
    assert_refused(negotiated)


@pytest.mark.parametrize("by", [1, 2])
def test_bad_input_8_used_ring_not_aligned_to_4(negotiated: Rig, by: int) -> None:
    negotiated.driver.setup_queue(used=RAM_BASE + 0x4000 + by)
    assert_refused(negotiated)


@pytest.mark.parametrize("area", ["desc", "avail", "used"])
@pytest.mark.parametrize("gpa", [0, RAM_BASE - 16, RAM_END - 16, RAM_END, 1 << 40])
def test_bad_input_9_ring_outside_ram(negotiated: Rig, area: str, gpa: int) -> None:
    negotiated.driver.setup_queue(**{area: gpa})  # type: ignore[arg-type]
    assert_refused(negotiated)


@pytest.mark.parametrize("area", ["desc", "avail", "used"])
def test_bad_input_12_ring_wraps_around_the_address_space(negotiated: Rig, area: str) -> None:
    negotiated.driver.setup_queue(**{area: 2**64 - 16})  # type: ignore[arg-type]
    assert_refused(negotiated)


@pytest.mark.parametrize("index", [1, 2, 0xFFFF, 0xFFFF_FFFF])
def test_bad_input_15_queue_sel_beyond_the_queues_reads_0(rig: Rig, index: int) -> None:
    driver = rig.driver
    driver.set(Register.QUEUE_SEL, index)
    assert driver.reg(Register.QUEUE_NUM_MAX) == 0
    assert driver.reg(Register.QUEUE_READY) == 0
    for register in (Register.QUEUE_NUM, Register.QUEUE_DESC_LOW, Register.QUEUE_READY):
        driver.set(register, 1)
    assert driver.reg(Register.QUEUE_READY) == 0
    driver.set(Register.QUEUE_SEL, 0)
    assert driver.reg(Register.QUEUE_READY) == 1
    assert driver.request(4).status == 0


def move_the_queue(rig: Rig) -> None:
    """Write every queue register with something else."""
    rig.driver.setup_queue(
        size=4, desc=RAM_BASE + 0x8000, avail=RAM_BASE + 0x9000, used=2**64 - 4, ready=False
    )


def leave_as_it_is(rig: Rig) -> None:
    """Do nothing between set-up and DRIVER_OK."""


@pytest.mark.parametrize("after_ready", [move_the_queue, leave_as_it_is])
def test_bad_input_17_queue_registers_are_frozen_after_ready_and_driver_ok(
    negotiated: Rig, after_ready: Callable[[Rig], None]
) -> None:
    driver = negotiated.driver
    driver.setup_queue()
    after_ready(negotiated)
    driver.set(Register.STATUS, 15)
    assert driver.status == 15
    move_the_queue(negotiated)
    driver.set(Register.QUEUE_READY, 1)
    assert driver.reg(Register.QUEUE_READY) == 1
    assert driver.request(0, 7, room=512) == (0, 513, b"\7" * 512)
    assert not driver.needs_reset


def test_a_full_fence_is_there_again_and_again() -> None:
    fence = FullFence()
    for _ in range(2):
        with fence:
            pass
