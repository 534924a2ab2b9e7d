"""What a driver must not do to the registers: bad inputs 72-88."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from pyvmm.virtio.spec import BlockFeature, Feature, InterruptBit, Register
from tests.support.patience import patient
from tests.support.rig import Hooked, Rig
from tests.support.virtio_driver import linked, readable, writable
from tests.virtio.conftest import MakeRig

pytestmark = pytest.mark.usefixtures("both_pages")

CONFIG_SIZE = 0x1000 - Register.CONFIG
CONFIG_END = 60  # of struct virtio_blk_config up to the fields of VIRTIO_BLK_F_LIFETIME
WRITE_ONLY = (
    Register.DEVICE_FEATURES_SEL,
    Register.DRIVER_FEATURES,
    Register.DRIVER_FEATURES_SEL,
    Register.QUEUE_SEL,
    Register.QUEUE_NUM,
    Register.QUEUE_NOTIFY,
    Register.INTERRUPT_ACK,
    Register.QUEUE_DESC_LOW,
    Register.QUEUE_DEVICE_HIGH,
)
READ_ONLY = (
    Register.MAGIC_VALUE,
    Register.VERSION,
    Register.DEVICE_ID,
    Register.VENDOR_ID,
    Register.DEVICE_FEATURES,
    Register.QUEUE_NUM_MAX,
    Register.INTERRUPT_STATUS,
    Register.SHM_LEN_LOW,
    Register.CONFIG_GENERATION,
)


def test_bad_input_72_access_of_1_2_or_8_bytes_to_a_register(rig: Rig) -> None:
    for register in Register:
        if register == Register.CONFIG:
            continue
        for size in (1, 2, 8):
            assert 0 <= rig.transport.read(register, size) < 1 << 8 * size
            rig.transport.write(register, size, (1 << 8 * size) - 1)
            rig.transport.write(register, size, 0)
    assert rig.driver.status == 15
    assert rig.driver.request(0, 5, room=512).data == b"\5" * 512


def test_bad_input_73_unaligned_access(rig: Rig) -> None:
    for offset in range(0x100):
        if offset % 4:
            assert 0 <= rig.transport.read(offset, 4) < 1 << 32
            rig.transport.write(offset, 4, 0xFFFF_FFFF)
            rig.transport.write(offset, 4, 0)
    assert rig.transport.read(0xFFD, 4) == 0xFFFF_FFFF
    assert rig.transport.read(0xFFC, 8) == 0xFFFF_FFFF_FFFF_FFFF
    rig.transport.write(0xFFD, 4, 1)
    assert rig.driver.status == 15
    assert rig.driver.request(0, 5, room=512).data == b"\5" * 512


def test_bad_input_75_read_of_write_only_and_write_of_read_only_registers(rig: Rig) -> None:
    driver = rig.driver
    for register in WRITE_ONLY:
        assert driver.reg(register) == 0
    for register in READ_ONLY:
        before = driver.reg(register)
        driver.set(register, ~before & 0xFFFF_FFFF)
        assert driver.reg(register) == before
    assert driver.request(4).status == 0


def test_bad_input_76_config_reads_past_the_structure(rig: Rig) -> None:
    for offset in range(CONFIG_END, CONFIG_SIZE - 8):
        assert rig.transport.read(Register.CONFIG + offset, 8) == 0
    assert rig.transport.read(0x1000, 4) == 0xFFFF_FFFF
    assert rig.driver.request(4).status == 0


def test_bad_input_77_config_writes(rig: Rig) -> None:
    before = rig.transport.page[Register.CONFIG :]
    for size in (1, 2, 4, 8):
        for offset in range(CONFIG_SIZE):
            rig.transport.write(Register.CONFIG + offset, size, (1 << 64) - 1)
    assert rig.transport.page[Register.CONFIG :] == before
    assert rig.driver.request(4).status == 0


def test_bad_input_78_notification_of_no_queue_or_before_driver_ok(new_rig: MakeRig) -> None:
    rig = new_rig()
    driver = rig.driver
    driver.negotiate()
    driver.setup_queue()
    driver.write_table(linked([readable(driver.header(4), 16), writable(driver.alloc(1), 1)]))
    driver.offer(0)
    driver.notify()
    assert driver.reap() == []
    driver.set(Register.STATUS, 15)
    for index in (1, 2, 0x1_0000, 0xFFFF_FFFF):
        driver.set(Register.QUEUE_NOTIFY, index)
        assert rig.transport.service(index) is None
    assert driver.reap() == []
    driver.notify()
    assert driver.reap() == [(0, 1)]
    # A queue that was never set up.
    driver.negotiate()
    driver.set(Register.STATUS, 15)
    assert driver.status == 15
    driver.notify()
    assert driver.status == 15
    assert rig.reports == []


@pytest.mark.parametrize("bit", [0, 4, 7, 15, 16, 17, 27, 33, 36, 38, 63])
def test_bad_input_80_unoffered_feature_is_refused(new_rig: MakeRig, bit: int) -> None:
    rig = new_rig()
    driver = rig.driver
    assert not driver.negotiate(Feature.VERSION_1 | 1 << bit)
    assert driver.status == 3
    assert rig.device.acked_features == 0
    driver.set(Register.STATUS, 15)
    assert driver.status == 3
    driver.accept(Feature.VERSION_1)  # a driver may think again
    driver.set(Register.STATUS, 11)
    assert driver.status == 11
    assert rig.device.acked_features == Feature.VERSION_1


def test_bad_input_80_driver_without_version_1_is_refused(new_rig: MakeRig) -> None:
    rig = new_rig()
    assert not rig.driver.negotiate(int(BlockFeature.FLUSH))
    assert rig.driver.status == 3
    assert "VERSION_1" in rig.reports[0]
    rig.assert_works()


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ([4], 0),
        ([15], 0),
        ([3], 0),
        ([1, 5], 1),
        ([1, 11], 1),
        ([1, 3, 7], 3),
        ([1, 3, 15], 3),
        ([1, 3, 0x103], 3),
        ([1, 3, 0x33], 3),
        ([0x100], 0),
        ([64], 0),
    ],
)
def test_bad_input_82_driver_ok_skipping_steps(
    new_rig: MakeRig, steps: list[int], status: int
) -> None:
    rig = new_rig()
    rig.driver.accept(rig.driver.offered)
    for step in steps:
        rig.driver.set(Register.STATUS, step)
    assert rig.driver.status == status
    assert not rig.device.is_activated
    rig.assert_works()


def test_bad_input_83_clearing_status_bits(rig: Rig) -> None:
    for value in (1, 3, 7, 11, 14, 13, 8, 4):
        rig.driver.set(Register.STATUS, value)
        assert rig.driver.status == 15
    assert rig.driver.request(4).status == 0
    rig.memory.write_int(rig.driver.avail + 2, 2, 0x8000)
    rig.driver.notify()
    assert rig.driver.needs_reset
    rig.driver.set(Register.STATUS, 15)
    rig.assert_needs_reset()


def test_bad_input_86_reset_with_io_in_flight(hooked: tuple[Rig, Hooked]) -> None:
    rig, backend = hooked
    driver = rig.driver
    reading, go_on, is_reset = threading.Event(), threading.Event(), threading.Event()

    def slow_readv(buffers: Sequence[memoryview], offset: int) -> None:
        reading.set()
        go_on.wait(patient(10))
        backend.backend.readv(buffers, offset)

    def reset() -> None:
        driver.set(Register.STATUS, 0)
        is_reset.set()

    backend.readv = slow_readv  # type: ignore[method-assign]
    buffer, status = driver.alloc(512), driver.status_byte()
    driver.write_table(
        linked([readable(driver.header(0, 9), 16), writable(buffer, 512), writable(status, 1)])
    )
    driver.offer(0)
    server = threading.Thread(target=rig.transport.service, args=(0,))
    resetter = threading.Thread(target=reset)
    server.start()
    assert reading.wait(patient(10))
    resetter.start()
    assert not is_reset.wait(0.05), "the reset did not wait for the read"
    assert driver.status == 15
    assert driver.reg(Register.INTERRUPT_STATUS) == rig.kept
    driver.set(Register.INTERRUPT_ACK, 3)  # acknowledging does not wait for the disk
    go_on.set()
    resetter.join(patient(10))
    server.join(patient(10))
    assert driver.status == 0
    assert driver.reg(Register.INTERRUPT_STATUS) == 0
    assert rig.memory.read(buffer, 512) == b"\x09" * 512
    driver.offer(0)
    after = bytes(rig.ram)
    assert rig.transport.service(0) is None
    assert bytes(rig.ram) == after, "written to after the status read 0"
    rig.assert_works()


def test_bad_input_88_acknowledging_bits_that_are_not_set(rig: Rig) -> None:
    driver = rig.driver
    driver.set(Register.INTERRUPT_ACK, 0xFFFF_FFFF)
    assert driver.reg(Register.INTERRUPT_STATUS) == rig.kept
    driver.request(4)
    driver.set(Register.INTERRUPT_ACK, 0xFFFF_FFFE)
    assert driver.reg(Register.INTERRUPT_STATUS) == InterruptBit.USED_BUFFER
    driver.set(Register.INTERRUPT_ACK, 1)
    assert driver.reg(Register.INTERRUPT_STATUS) == rig.kept
    assert driver.request(4).status == 0


@pytest.mark.parametrize("word", [2, 3, 0xFFFF_FFFF])
def test_bad_input_80_feature_bits_from_64_on_are_refused(new_rig: MakeRig, word: int) -> None:
    rig = new_rig()
    driver = rig.driver
    driver.set(Register.STATUS, 1)
    driver.set(Register.STATUS, 3)
    driver.accept(Feature.VERSION_1)
    driver.set(Register.DRIVER_FEATURES_SEL, word)
    driver.set(Register.DRIVER_FEATURES, 1)
    driver.set(Register.STATUS, 11)
    assert driver.status == 3
    rig.assert_works()
