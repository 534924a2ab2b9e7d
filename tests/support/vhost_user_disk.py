"""A device over a scripted back end: what the guest and the back end make of each other."""

from __future__ import annotations

import contextlib
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyvmm.memory import GuestMemory
from pyvmm.vhost_user.block import VhostUserBlock
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.protocol import CONFIG, VRING_STATE, Request
from pyvmm.virtio.device import NoSlot
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.vhost_user_peers import ScriptedBackend, open_fds
from tests.support.virtio_driver import RAM_BASE, BlockDriver

RAM_BYTES = 1 << 20
VERSION_1 = int(Feature.VERSION_1)
FEATURES = VERSION_1 | int(
    BlockFeature.SEG_MAX | BlockFeature.FLUSH | BlockFeature.CONFIG_WCE | BlockFeature.MQ
    | Feature.RING_RESET
)  # fmt: skip
SPACE_BYTES = 36
RING_REQUESTS = (
    Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ADDR,
    Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ENABLE,
)  # fmt: skip


def config_space(
    *, sectors: int = 64, size_max: int = 0, seg_max: int = 126, writeback: int = 1, queues: int = 4
) -> bytes:
    """The fields of struct virtio_blk_config up to num_queues."""
    return struct.pack("<QII16xBxH", sectors, size_max, seg_max, writeback, queues)


class EventfdSlot(NoSlot):
    """A slot of eventfds that somebody else has made, without a thread."""

    def __init__(self, irq_fd: int, doorbells: tuple[int, ...]) -> None:
        self.irq_fd = irq_fd
        self.doorbells = doorbells


@dataclass
class Eventfds:
    """What KVM would signal and wait for."""

    kicks: tuple[int, ...]
    call: int
    reasons: list[str] = field(default_factory=list)

    def device(self, frontend: Frontend, *, queue_size: int = 256) -> VhostUserBlock:
        """A device that uses them; ``reasons`` are why its back end was lost."""
        device = VhostUserBlock(
            frontend, max_queues=len(self.kicks), lost=self.reasons.append, queue_size=queue_size
        )
        device.plug(EventfdSlot(self.call, self.kicks))
        return device


@contextlib.contextmanager
def eventfds(queues: int) -> Iterator[Eventfds]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(queues + 1)]
    try:
        yield Eventfds(tuple(fds[1:]), fds[0])
    finally:
        for fd in fds:
            os.close(fd)


class Script:
    """The device over a scripted back end, its transport, and a driver of queue 0."""

    def __init__(self, features: int, space: bytes, fds: Eventfds, stack: contextlib.ExitStack):
        self.peer = stack.enter_context(ScriptedBackend())
        self.fds = fds
        self.peer.shake_hands(features=features)
        self.frontend = stack.enter_context(Frontend(self.peer.channel, timeout_s=0.05))
        self.say_space(space)
        self.device = fds.device(self.frontend)
        self.memory = stack.enter_context(GuestMemory([(RAM_BASE, RAM_BYTES)], shared=True))
        self.reports: list[str] = []
        self.transport = MmioTransport(
            self.device, self.memory, lambda: None, report=self.reports.append
        )
        stack.callback(self.transport.close)
        self.driver = BlockDriver(self.transport, self.memory)
        self.heard()

    def say_space(self, space: bytes) -> None:
        self.peer.say(Request.GET_CONFIG, CONFIG.pack(0, len(space), 0) + space)

    def say_negotiated(self, space: bytes | None = None) -> None:
        """What a back end says to FEATURES_OK."""
        self.peer.acknowledge(Request.SET_FEATURES)
        self.say_space(config_space() if space is None else space)

    def start(self) -> None:
        """From reset to DRIVER_OK, for the first time."""
        self.say_negotiated()
        self.peer.acknowledge(Request.ADD_MEM_REG, *RING_REQUESTS)
        self.driver.start(FEATURES)

    def say_stopped(self, base: int = 0, index: int = 0) -> None:
        self.peer.say(Request.GET_VRING_BASE, VRING_STATE.pack(index, base))

    def heard(self) -> list[tuple[str, bytes]]:
        messages = self.peer.heard()
        for message in messages:
            message.close_fds()
        return [(message.name, message.payload) for message in messages]

    def names(self) -> list[str]:
        return [name for name, _ in self.heard()]

    @property
    def reasons(self) -> list[str]:
        return self.fds.reasons


@contextlib.contextmanager
def scripted(
    *, features: int = FEATURES, space: bytes | None = None, queues: int = 2
) -> Iterator[Script]:
    before = open_fds()
    with contextlib.ExitStack() as stack:
        fds = stack.enter_context(eventfds(queues))
        yield Script(features, config_space() if space is None else space, fds, stack)
    assert open_fds() == before


def is_readable(fd: int) -> bool:
    """Whether there is something to read from ``fd`` now."""
    return bool(select.select([fd], [], [], 0)[0])
