"""The block device: what it offers and serves, in any framing."""

from __future__ import annotations

import os
import struct

import pytest

from pyvmm.errors import ActivateError
from pyvmm.storage.raw import RawBackend
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.spec import BlockFeature
from tests.support.rig import RAM_BYTES, Hooked, Rig
from tests.support.virtio_driver import (
    RAM_BASE,
    readable,
    writable,
)
from tests.virtio.conftest import MakeRig

RAM_END = RAM_BASE + RAM_BYTES
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2


class NoInterrupt:
    """An interrupt line that leads nowhere."""

    def notify_used(self, queue_index: int) -> None: ...

    def notify_config(self) -> None: ...


# What it serves


@pytest.mark.parametrize("indirect", [False, True])
def test_read_and_write(rig: Rig, indirect: bool) -> None:
    driver = rig.driver
    assert driver.request(IN, 2, room=1024, indirect=indirect) == (
        OK,
        1025,
        b"\2" * 512 + b"\3" * 512,
    )
    data = os.urandom(2048)
    before = rig.disk
    assert driver.request(OUT, 60, data=data, indirect=indirect) == (OK, 1, b"")
    assert rig.disk == before[: 60 * 512] + data
    assert driver.request(IN, 60, room=2048, indirect=indirect).data == data


def test_flush_reaches_the_backend(hooked: tuple[Rig, Hooked]) -> None:
    rig, backend = hooked
    calls: list[str] = []
    backend.flush = lambda: calls.append("flush")  # type: ignore[method-assign]
    assert rig.driver.request(FLUSH) == (OK, 1, b"")
    assert calls == ["flush"]
    rig.driver.request(OUT, data=bytes(512))
    assert calls == ["flush"]


def test_read_only_disk_is_offered_as_such(new_rig: MakeRig) -> None:
    rig = new_rig(config=BlockConfig(read_only=True, queue_size=16))
    assert rig.device.avail_features & BlockFeature.RO
    rig.driver.start()
    assert rig.driver.request(IN, 4, room=512).data == b"\4" * 512


def test_read_only_backend_makes_a_read_only_disk(new_rig: MakeRig) -> None:
    rig = new_rig()
    rig.backend.close()
    backend = RawBackend(str(rig.path), read_only=True, report=rig.reports.append)
    rig = new_rig(backend=backend)
    assert rig.device.avail_features & BlockFeature.RO
    rig.driver.start()
    assert rig.driver.request(OUT, data=bytes(512)).status == IOERR


def test_one_byte_descriptors_for_everything(new_rig: MakeRig) -> None:
    rig = new_rig(queue_size=1024)
    driver = rig.driver
    driver.start()
    header, data, status = driver.header(IN, 6), driver.alloc(512), driver.status_byte()
    chain = [readable(header + i, 1) for i in range(16)]
    chain += [writable(data + i, 1) for i in range(512)]
    chain += [writable(status, 1)]
    assert driver.ask(chain, status, data, 512) == (OK, 513, b"\6" * 512)


def test_data_and_status_share_a_descriptor(rig: Rig) -> None:
    driver = rig.driver
    data = driver.alloc(513)
    chain = [readable(driver.header(IN, 6), 16), writable(data, 513)]
    answer = driver.ask(chain, data + 512, data, 512)
    assert answer == (OK, 513, b"\6" * 512)


def test_header_and_data_share_a_descriptor(rig: Rig) -> None:
    driver = rig.driver
    request = driver.put(struct.pack("<IIQ", OUT, 0, 9) + b"d" * 512)
    status = driver.status_byte()
    chain = [readable(request, 528), writable(status, 1)]
    assert driver.ask(chain, status) == (OK, 1, b"")
    assert rig.disk[9 * 512 : 10 * 512] == b"d" * 512


def test_data_descriptors_need_not_be_whole_sectors(rig: Rig) -> None:
    driver = rig.driver
    payload = os.urandom(1024)
    data, status = driver.put(payload), driver.status_byte()
    chain = [readable(driver.header(OUT, 30), 16)]
    chain += [readable(data, 1), readable(data + 1, 600), readable(data + 601, 423)]
    assert driver.ask([*chain, writable(status, 1)], status) == (OK, 1, b"")
    assert rig.disk[30 * 512 : 32 * 512] == payload


def test_activation_happens_once_per_driver_ok(rig: Rig) -> None:
    assert rig.device.is_activated
    with pytest.raises(ActivateError, match="reset first"):
        rig.device.activate(rig.memory, NoInterrupt())


def test_reset_device_can_be_activated_again(rig: Rig) -> None:
    rig.device.reset()
    assert rig.device.process_queue(0) is None
    rig.device.activate(rig.memory, NoInterrupt())
    assert rig.device.is_activated


def test_activation_with_a_malformed_queue_is_an_error(new_rig: MakeRig) -> None:
    rig = new_rig()
    device = rig.device
    device.queues[0].ready = True
    with pytest.raises(ActivateError, match="queue size 0"):
        device.activate(rig.memory, NoInterrupt())
    assert not device.is_activated
