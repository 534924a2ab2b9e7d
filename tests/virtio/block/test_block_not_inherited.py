"""Faults that well-known block devices have, one test each: this one must not inherit them.

All go through the transport's registers, with the rings a guest would write.
"""

from __future__ import annotations

import os

import pytest

from pyvmm.errors import ActivateError
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.raw import RawBackend
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.device import Interrupt, VirtioDevice
from pyvmm.virtio.spec import BlockFeature, Feature, InterruptBit, Register, Status
from tests.support.echo_device import EchoRig
from tests.support.rig import DISK_SECTORS, Hooked, Rig
from tests.support.virtio_driver import VirtioDriver, readable, writable
from tests.virtio.conftest import MakeRig

pytestmark = pytest.mark.usefixtures("both_paths")

IN, OUT, FLUSH = 0, 1, 4
OK, IOERR, UNSUPP = 0, 1, 2
V1 = int(Feature.VERSION_1)


@pytest.mark.parametrize("sector", [DISK_SECTORS - 1, DISK_SECTORS, 2**20, 2**55 - 1])
def test_write_past_the_end_does_not_grow_the_file(rig: Rig, sector: int) -> None:
    disk = rig.disk
    assert rig.driver.request(OUT, sector, data=b"g" * 1024).status == IOERR
    assert rig.disk == disk
    assert rig.path.stat().st_size == DISK_SECTORS * 512


def test_read_only_is_enforced_by_the_device_not_only_by_the_backend(
    new_rig: MakeRig,
) -> None:
    disk = bytearray(DISK_SECTORS * 512)
    backend = MemoryBackend(disk)  # it would take every write
    rig = new_rig(config=BlockConfig(read_only=True, queue_size=16), backend=backend)
    rig.driver.start(V1)  # F_RO is not even acknowledged
    assert rig.driver.request(OUT, data=b"w" * 512).status == IOERR
    for request_type in (11, 13):
        segment = bytes(8) + b"\1\0\0\0" + bytes(4)
        assert rig.driver.request(request_type, data=segment).status == UNSUPP
    assert disk == bytes(DISK_SECTORS * 512)


def test_malformed_head_comes_back_and_does_not_stall_the_queue(rig: Rig) -> None:
    driver = rig.driver
    header, status = driver.header(IN), driver.status_byte()
    room, good = driver.alloc(512), driver.status_byte()
    driver.place([readable(header, 16)], 0)  # no status
    driver.place([readable(header, 7), writable(status, 1)], 1)  # half a header
    driver.place([writable(status, 1)], 3)  # no header
    driver.place([readable(2**40, 16), writable(status, 1)], 4)  # header nowhere
    driver.place([readable(header, 16), writable(room, 512), writable(good, 1)], 6)
    driver.notify()
    assert driver.reap() == [(0, 0), (1, 0), (3, 0), (4, 0), (6, 513)]
    assert rig.memory.read_int(good, 1) == OK
    assert not driver.needs_reset


@pytest.mark.parametrize("ahead", [17, 100, 0x8000, 0xFFFF])
def test_jump_of_avail_idx_is_checked(rig: Rig, ahead: int) -> None:
    rig.memory.write_int(rig.driver.avail + 2, 2, ahead)
    rig.driver.notify()
    assert rig.driver.reap() == []
    rig.assert_needs_reset()


def test_interrupt_status_does_not_survive_a_reset(rig: Rig) -> None:
    rig.driver.request(FLUSH)
    rig.transport.config_changed()
    both = InterruptBit.USED_BUFFER | InterruptBit.CONFIG_CHANGE
    assert rig.driver.reg(Register.INTERRUPT_STATUS) == both
    rig.driver.set(Register.STATUS, 0)
    assert rig.driver.reg(Register.INTERRUPT_STATUS) == 0


def test_activation_happens_again_after_every_reset(rig: Rig) -> None:
    for _ in range(5):
        rig.driver.start()
        assert rig.device.is_activated
        assert rig.driver.request(IN, 1, room=512).data == b"\1" * 512
        rig.driver.set(Register.STATUS, 0)
        assert not rig.device.is_activated


def test_features_are_taken_anew_not_ored_together(rig: Rig) -> None:
    driver = rig.driver
    driver.start(V1 | BlockFeature.FLUSH)
    assert driver.request(FLUSH).status == OK
    driver.start(V1)
    assert rig.device.acked_features == V1
    assert driver.request(FLUSH).status == UNSUPP
    # Nor within one negotiation: what was written last counts.
    driver.set(Register.STATUS, 0)
    driver.set(Register.STATUS, 1)
    driver.set(Register.STATUS, 3)
    driver.accept(V1 | BlockFeature.FLUSH)
    driver.accept(V1 | BlockFeature.MQ)
    driver.set(Register.STATUS, 11)
    assert rig.device.acked_features == V1 | BlockFeature.MQ


@pytest.mark.parametrize(
    "features",
    [
        0,
        int(BlockFeature.FLUSH),  # without VERSION_1
        V1 | BlockFeature.SECURE_ERASE,
        V1 | BlockFeature.LIFETIME,
        V1 | 1 << 27,
        V1 | 1 << 63,
    ],
)
def test_features_ok_is_refused(rig: Rig, features: int) -> None:
    assert not rig.driver.negotiate(features)
    assert rig.driver.status == Status.ACKNOWLEDGE | Status.DRIVER
    assert rig.device.acked_features == 0
    rig.driver.setup_queue()
    rig.driver.set(Register.STATUS, 15)
    assert not rig.device.is_activated


def test_activation_error_comes_with_a_config_interrupt(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: VirtioDevice, memory: object, interrupt: Interrupt) -> None:
        raise ActivateError("out of order")

    driver = rig.driver
    driver.restart()
    driver.negotiate()
    driver.setup_queue()
    irqs = len(rig.irqs)
    monkeypatch.setattr(VirtioDevice, "activate", refuse)
    driver.set(Register.STATUS, 15)
    monkeypatch.undo()
    assert len(rig.irqs) == irqs + 1
    rig.assert_needs_reset()


@pytest.mark.parametrize("request_type", [IN, OUT])
def test_buffers_of_the_wrong_direction_are_refused_not_skipped(
    rig: Rig, request_type: int
) -> None:
    driver, disk = rig.driver, rig.disk
    data, room, status = driver.put(os.urandom(512)), driver.alloc(512), driver.status_byte()
    chain = [readable(driver.header(request_type, 3), 16), readable(data, 512)]
    chain += [writable(room, 512), writable(status, 1)]
    assert driver.ask(chain, status, room, 512) == (IOERR, 1, bytes(512))
    assert rig.disk == disk


# The other half of "work is bounded"


def test_one_pass_takes_at_most_a_queue_of_requests(hooked: tuple[Rig, Hooked]) -> None:
    rig, backend = hooked
    driver = rig.driver
    room, header = driver.alloc(512), driver.header(IN)
    status = driver.status_byte()
    calls = 0

    def flood(buffers: object, offset: int) -> None:
        """A driver on another vCPU that reuses the head as soon as it is taken."""
        nonlocal calls
        calls += 1
        driver.offer(0)

    backend.readv = flood  # type: ignore[method-assign]
    driver.place([readable(header, 16), writable(room, 512), writable(status, 1)])
    assert rig.transport.service(0) == 0.0  # more at once, after the others had their turn
    assert 1 <= calls <= driver.size


def test_no_interrupt_for_a_driver_that_asked_for_none(rig: Rig) -> None:
    rig.driver.want_interrupts(False)
    irqs = len(rig.irqs)
    for _ in range(5):
        assert rig.driver.request(FLUSH).status == OK
    assert len(rig.irqs) == irqs


def test_backend_is_opened_and_closed_by_the_caller_only(new_rig: MakeRig) -> None:
    rig = new_rig()
    rig.driver.start()
    rig.transport.close()
    assert isinstance(rig.backend, RawBackend)
    rig.backend.flush()


def test_a_device_that_is_no_disk_is_activated_after_a_failure_too() -> None:
    echo = EchoRig()
    driver = VirtioDriver(echo.transport, echo.memory, size=4)
    echo.device.refuse_activation = True
    driver.negotiate()
    driver.setup_queue()
    driver.set(Register.STATUS, 15)
    assert driver.needs_reset
    echo.device.refuse_activation = False
    driver.start()
    assert echo.device.is_activated
    echo.transport.close()
