"""The transport: registers, status machine, interrupts."""

from __future__ import annotations

import mmap

import pytest

from pyvmm.virtio.register_page import VENDOR_ID
from pyvmm.virtio.spec import Feature, InterruptBit, Register, Status
from tests.support.echo_device import EchoRig
from tests.support.rig import Hooked, Rig
from tests.support.virtio_driver import (
    RAM_BASE,
    VirtioDriver,
    linked,
    readable,
    writable,
)
from tests.virtio.conftest import MakeRig


@pytest.fixture
def echo() -> EchoRig:
    return EchoRig()


def test_identity_registers(rig: Rig) -> None:
    driver = rig.driver
    assert driver.reg(Register.MAGIC_VALUE) == int.from_bytes(b"virt", "little")
    assert driver.reg(Register.VERSION) == 2
    assert driver.reg(Register.DEVICE_ID) == 2
    assert driver.reg(Register.VENDOR_ID) == VENDOR_ID


def test_registers_are_read_from_the_page(rig: Rig) -> None:
    assert rig.transport.page[0:4] == b"virt"
    assert len(rig.transport.page) == 4096
    rig.transport.page[0:4] = b"tirv"
    assert rig.driver.reg(Register.MAGIC_VALUE) == int.from_bytes(b"tirv", "little")


def test_device_features_sel_changes_what_the_page_shows() -> None:
    echo = EchoRig(int(Feature.VERSION_1 | Feature.RING_RESET | 0x8000_0001))
    driver = VirtioDriver(echo.transport, echo.memory, size=4)
    for word, features in [(0, 0x8000_0001), (1, 0x101), (2, 0), (0xFFFF_FFFF, 0), (1, 0x101)]:
        driver.set(Register.DEVICE_FEATURES_SEL, word)
        assert driver.reg(Register.DEVICE_FEATURES) == features


def test_shared_memory_regions_do_not_exist(rig: Rig) -> None:
    for register in range(Register.SHM_LEN_LOW, Register.SHM_BASE_HIGH + 4, 4):
        assert rig.driver.reg(register) == 0xFFFF_FFFF


def test_queue_sel_changes_what_the_page_shows(echo: EchoRig) -> None:
    driver = VirtioDriver(echo.transport, echo.memory, size=4, index=1)
    driver.negotiate()
    driver.setup_queue()
    assert driver.reg(Register.QUEUE_NUM_MAX) == 4
    assert driver.reg(Register.QUEUE_READY) == 1
    driver.set(Register.QUEUE_SEL, 0)
    assert driver.reg(Register.QUEUE_NUM_MAX) == 8
    assert driver.reg(Register.QUEUE_READY) == 0


def test_each_queue_is_served_by_its_own_notification(echo: EchoRig) -> None:
    driver = VirtioDriver(echo.transport, echo.memory, size=4, index=1)
    driver.start()
    buffer = driver.alloc(3)
    driver.write_table([writable(buffer, 3)])
    driver.offer(0)
    driver.set(Register.QUEUE_NOTIFY, 0)
    assert driver.reap() == []
    driver.notify()
    assert driver.reap() == [(0, 3)]
    assert echo.memory.read(buffer, 3) == b"\3\3\3"
    assert len(echo.irqs) == 1


def test_config_change_bumps_the_generation_and_interrupts(echo: EchoRig) -> None:
    driver = VirtioDriver(echo.transport, echo.memory, size=4)
    generation = driver.reg(Register.CONFIG_GENERATION)
    echo.device.config[:] = b"12345678"
    echo.transport.config_changed()
    assert driver.reg(Register.CONFIG_GENERATION) != generation
    assert echo.irqs == []  # nobody there yet: "before DRIVER_OK" nothing is sent
    driver.start()
    generation = driver.reg(Register.CONFIG_GENERATION)
    echo.device.config[:] = b"abcdefgh"
    echo.transport.config_changed()
    assert driver.reg(Register.CONFIG_GENERATION) != generation
    assert driver.reg(Register.INTERRUPT_STATUS) == InterruptBit.CONFIG_CHANGE
    assert len(echo.irqs) == 1
    assert driver.reg(Register.CONFIG) == int.from_bytes(b"abcd", "little")


def test_config_write_is_seen_before_the_write_returns(echo: EchoRig) -> None:
    echo.transport.write(Register.CONFIG + 2, 2, 0x4241)
    assert echo.transport.read(Register.CONFIG, 4) == 0x4241_0000


def test_activation_error_needs_reset_and_tells_the_driver(echo: EchoRig) -> None:
    driver = VirtioDriver(echo.transport, echo.memory, size=4)
    driver.negotiate()
    driver.setup_queue()
    echo.device.refuse_activation = True
    driver.set(Register.STATUS, 15)
    assert driver.status == 15 | Status.DEVICE_NEEDS_RESET
    assert driver.reg(Register.INTERRUPT_STATUS) == InterruptBit.CONFIG_CHANGE
    assert len(echo.irqs) == 1
    assert "out of order" in echo.reports[0]
    echo.device.refuse_activation = False
    driver.start()
    assert echo.device.is_activated


def test_driver_that_fails_stops_the_device_until_reset(rig: Rig) -> None:
    driver = rig.driver
    driver.set(Register.STATUS, 15 | Status.FAILED)
    assert driver.status == 15 | Status.FAILED
    driver.submit([readable(driver.header(4), 16), writable(driver.status_byte(), 1)])
    assert driver.reap() == []
    driver.set(Register.STATUS, 15)
    assert driver.status == 15 | Status.FAILED
    rig.assert_works()


def test_reset_clears_everything(rig: Rig) -> None:
    driver = rig.driver
    driver.request(4)
    assert driver.reg(Register.INTERRUPT_STATUS) == InterruptBit.USED_BUFFER
    driver.set(Register.STATUS, 0)
    assert driver.status == 0
    assert driver.reg(Register.INTERRUPT_STATUS) == 0
    assert driver.reg(Register.QUEUE_READY) == 0
    assert not rig.device.is_activated
    assert rig.device.acked_features == 0
    queue = rig.device.queues[0]
    assert (queue.size, queue.ready, queue.descriptor_area) == (0, False, None)
    # DriverFeatures too: FEATURES_OK without writing them again is refused.
    for status in (1, 3, 11):
        driver.set(Register.STATUS, status)
    assert driver.status == 3


def test_reset_can_be_repeated(rig: Rig) -> None:
    for _ in range(50):
        rig.assert_works()
    assert rig.reports == []


def test_stopped_queue_is_left_alone(rig: Rig) -> None:
    driver = rig.driver
    driver.set(Register.QUEUE_READY, 0)
    assert driver.reg(Register.QUEUE_READY) == 0
    driver.submit([readable(driver.header(4), 16), writable(driver.status_byte(), 1)])
    assert driver.reap() == []
    driver.set(Register.QUEUE_READY, 1)  # after DRIVER_OK it cannot be set up again
    assert driver.reg(Register.QUEUE_READY) == 0
    rig.assert_works()


def test_queue_can_be_set_up_again_before_driver_ok(new_rig: MakeRig) -> None:
    rig = new_rig()
    rig.driver.negotiate()
    rig.driver.setup_queue(desc=RAM_BASE + 0x8000)
    rig.driver.set(Register.QUEUE_READY, 0)
    rig.driver.setup_queue()
    rig.driver.set(Register.STATUS, 15)
    assert rig.driver.request(4).status == 0


def test_service_says_whether_more_is_waiting(hooked: tuple[Rig, Hooked]) -> None:
    rig, backend = hooked
    driver = rig.driver
    flush = [readable(driver.header(4), 16), writable(driver.status_byte(), 1)]
    driver.write_table([*linked(flush, 0), *linked(flush, 2)])

    def offer_another() -> None:
        driver.offer(2)
        backend.flush = lambda: None  # type: ignore[method-assign]

    backend.flush = offer_another  # type: ignore[method-assign]
    driver.offer(0)
    assert rig.transport.service(0) == 0.0
    assert driver.reap() == [(0, 1)]
    assert rig.transport.service(0) is None
    assert driver.reap() == [(2, 1)]


def test_one_interrupt_for_a_batch_and_none_when_unwanted(rig: Rig) -> None:
    driver = rig.driver
    status = driver.status_byte()
    header = driver.header(4)
    for head in range(0, 16, 2):
        driver.write_table(linked([readable(header, 16), writable(status, 1)], head), head)
    driver.offer(*range(0, 16, 2))
    driver.notify()
    assert len(driver.reap()) == 8
    assert len(rig.irqs) == 1
    rig.memory.write_int(driver.avail, 2, 1)  # VIRTQ_AVAIL_F_NO_INTERRUPT
    driver.offer(0)
    driver.notify()
    assert driver.reap() == [(0, 1)]
    assert len(rig.irqs) == 1
    driver.notify()  # nothing new: nothing to tell
    assert len(rig.irqs) == 1


def test_close_frees_the_page_and_stops_the_device(rig: Rig) -> None:
    rig.transport.close()
    rig.transport.close()
    assert isinstance(rig.transport.page, mmap.mmap)
    assert rig.transport.page.closed
    assert not rig.device.is_activated
    assert rig.transport.service(0) is None


def test_features_are_frozen_by_features_ok(rig: Rig) -> None:
    rig.driver.negotiate(int(Feature.VERSION_1))
    rig.driver.accept(rig.driver.offered)
    rig.driver.set(Register.STATUS, 15)
    assert rig.device.acked_features == Feature.VERSION_1


def test_a_kept_used_bit_is_there_from_driver_ok_to_reset(new_rig: MakeRig) -> None:
    rig = new_rig(keep_used=True)
    driver = rig.driver
    both = InterruptBit.USED_BUFFER | InterruptBit.CONFIG_CHANGE
    assert driver.negotiate()
    driver.setup_queue()
    assert driver.reg(Register.INTERRUPT_STATUS) == 0
    driver.set(Register.STATUS, 15)
    assert driver.reg(Register.INTERRUPT_STATUS) == InterruptBit.USED_BUFFER
    rig.transport.config_changed()
    assert driver.reg(Register.INTERRUPT_STATUS) == both
    driver.set(Register.INTERRUPT_ACK, both)
    assert driver.reg(Register.INTERRUPT_STATUS) == InterruptBit.USED_BUFFER
    before = len(rig.irqs)
    assert driver.request(0, 1, room=512) == (0, 513, rig.disk[512:1024])
    assert len(rig.irqs) == before + 1
    driver.set(Register.STATUS, 0)
    assert driver.reg(Register.INTERRUPT_STATUS) == 0
    driver.start()
    assert driver.request(0, 1, room=512) == (0, 513, rig.disk[512:1024])
