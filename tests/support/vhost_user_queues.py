"""What the tests of the vhost-user transport share: where queues are, and setting them up."""

from __future__ import annotations

import os

from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.transport import QueueLayout
from pyvmm.driver.vhost_user import VhostUserTransport
from pyvmm.virtio.spec import Feature

V1 = int(Feature.VERSION_1)


def fds_open() -> list[str]:
    """The file descriptors of this process."""
    return sorted(os.listdir("/proc/self/fd"))


def layouts(memory: SharedMemory, count: int = 2) -> list[QueueLayout]:
    """Where ``count`` queues of 16 entries are in ``memory``."""
    return [
        QueueLayout(16, start, start + 0x400, start + 0x800)
        for start in range(memory.address, memory.address + count * 4096, 4096)
    ]


def set_up(transport: VhostUserTransport, memory: SharedMemory, count: int = 2) -> None:
    """Give the back end ``memory`` and ``count`` queues in it."""
    transport.negotiate(V1)
    transport.map_mem_region(memory.address, memory.length, memory.fd)
    transport.setup_queues(layouts(memory, count))
