"""Our back end on a host that has no room for one more eventfd to wait for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from pyvmm.peers.eventfds import EventfdWriter
from pyvmm.storage.memory import MemoryBackend
from pyvmm.vhost_user.backend import ServedDevice
from pyvmm.vhost_user.protocol import PROTOCOL_FEATURES, MemoryRegion
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.spec import Feature
from tests.support.vhost_rig import RAM_BYTES, USER_BASE, held, memfd
from tests.support.virtio_driver import RAM_BASE


class FullKicks:
    """A loop that can wait for no more eventfds, for once."""

    def __init__(self) -> None:
        self.eventfd_writer = EventfdWriter()
        self.is_full = True

    def watch(self, fd: int, serve: Callable[[], float | None]) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def unwatch(self, fd: int) -> None:
        """Nothing was kept."""


def test_a_ring_that_cannot_be_waited_for_is_not_started() -> None:
    before = held()
    device = BlockDevice(BlockConfig(queue_size=16), MemoryBackend(bytearray(512)))
    kicks = FullKicks()
    backend = ServedDevice(device, kicks, report=print, stuck=lambda: None)
    ram, kick = memfd(RAM_BYTES), os.eventfd(0, os.EFD_NONBLOCK)
    region = MemoryRegion(RAM_BASE, RAM_BYTES, USER_BASE, 0)
    backend.add_mem_reg(region, ram)
    backend.set_features(int(Feature.VERSION_1) | PROTOCOL_FEATURES)
    backend.set_vring_num(0, 16)
    backend.set_vring_addr(
        0, descriptor=USER_BASE, driver=USER_BASE + 1024, device=USER_BASE + 2048
    )
    backend.set_vring_enable(0, 1)
    with pytest.raises(OSError, match="No space"):
        backend.set_vring_kick(0, kick)
    assert [queue.ready for queue in device.queues] == [False]
    backend.rem_mem_reg(region)  # nothing runs in it, and no view of it is left
    backend.add_mem_reg(region, ram)
    kicks.is_full = False
    backend.set_vring_kick(0, kick)
    assert [queue.ready for queue in device.queues] == [True]
    backend.close()
    os.close(ram)
    os.close(kick)
    assert held() == before
