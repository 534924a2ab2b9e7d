"""Our run and a wicked back end: what it answers, when, with which descriptors, and what it says
unasked."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable

from fuzz.checks import check_one_line
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.errors import VhostUserError
from pyvmm.memory import GuestMemory
from pyvmm.run.io_loop import LAST_WAIT_S
from pyvmm.vhost_user.block import VhostUserBlock
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.protocol import (
    CONFIG,
    PROTOCOL_FEATURES,
    REPLY,
    U64,
    VERSION,
    VRING_STATE,
    Request,
)
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Register
from tests.support.vhost_user_disk import (
    FEATURES,
    RAM_BYTES,
    RING_REQUESTS,
    EventfdSlot,
    config_space,
)
from tests.support.vhost_user_peers import (
    ALL_PROTOCOL_FEATURES,
    ScriptedBackend,
    open_fds,
    send_raw,
)
from tests.support.virtio_driver import RAM_BASE, BlockDriver

_TIMEOUT_S = 0.002
_REQUESTS = tuple(int(request) for request in Request)
_MOST_STEPS = 12


class FrontendTarget(Target):
    """Whatever a back end says, our methods raise what they document, and registers nothing."""

    is_structured = True
    max_bytes = 1024
    limit_s = 4.0

    def __init__(self) -> None:
        self._memory = GuestMemory([(RAM_BASE, RAM_BYTES)], shared=True)
        self._fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(5)]

    def run(self, data: bytes) -> None:
        """Have a disk of the back end that ``data`` describes."""
        before = open_fds()
        with ScriptedBackend() as peer:
            _Case(Source(data), peer, self._memory, self._fds).act()
        assert open_fds() == before, "descriptors were left behind"

    def close(self) -> None:
        """See ``Target.close``."""
        while self._fds:
            os.close(self._fds.pop())


class _Case:
    """One connection, and the guest in front of it."""

    def __init__(
        self, source: Source, peer: ScriptedBackend, memory: GuestMemory, fds: list[int]
    ) -> None:
        self._source = source
        self._peer = peer
        self._memory = memory
        self._fds = fds
        self._lost: list[str] = []

    def act(self) -> None:
        """Shake hands; make a device; be its guest."""
        source = self._source
        features = FEATURES | PROTOCOL_FEATURES
        offered = source.edge(ALL_PROTOCOL_FEATURES, 0, 1 << 9, bits=20) \
            if source.chance(96) else ALL_PROTOCOL_FEATURES
        for request, number in (
            (Request.GET_FEATURES, features), (Request.GET_PROTOCOL_FEATURES, offered),
            (Request.GET_QUEUE_NUM, 4), (Request.GET_MAX_MEM_SLOTS, 32),
        ):
            self._say(request, U64.pack(number))
        try:
            frontend = Frontend(self._peer.channel, timeout_s=_TIMEOUT_S,
                                stop_timeout_s=_TIMEOUT_S)
        except VhostUserError as error:
            check_one_line(error)
            return
        with frontend:
            try:
                self._say_space()
                device = VhostUserBlock(
                    frontend, max_queues=len(self._fds) - 1, lost=self._lost.append
                )
            except VhostUserError:
                return
            device.plug(EventfdSlot(self._fds[0], tuple(self._fds[1:])))
            self._be_guest(device)
        assert len(self._lost) <= 1, f"lost more than once: {self._lost}"

    def _be_guest(self, device: VhostUserBlock) -> None:
        """No method of a transport raises, whatever the back end does."""
        source = self._source
        transport = MmioTransport(device, self._memory, lambda: None, report=_ignore)
        driver = BlockDriver(transport, self._memory)
        steps: list[Callable[[], object]] = [
            lambda: self._start(driver),
            lambda: self._stop(transport),
            lambda: self._reset_queue(transport),
            device.look,
            lambda: self._refresh(device, transport),
            lambda: transport.write(Register.CONFIG + 32, 1, source.bits(1)),
            driver.notify,
            lambda: device.hurry(time.monotonic() + LAST_WAIT_S),
            self._peer.hang_up,
            self._say_anything,
        ]
        with contextlib.suppress(IndexError):
            for _ in range(_MOST_STEPS):
                if not source.more:
                    break
                source.pick(steps)()
        self._stop(transport)
        assert transport.read(Register.STATUS, 4) == 0
        transport.close()

    def _start(self, driver: BlockDriver) -> None:
        self._say(Request.SET_FEATURES, U64.pack(0))
        self._say_space()
        self._say(Request.ADD_MEM_REG, U64.pack(0))
        for request in RING_REQUESTS:
            self._say(request, U64.pack(0))
        with contextlib.suppress(AssertionError):  # a device that refuses is one
            driver.start(FEATURES)

    def _stop(self, transport: MmioTransport) -> None:
        for index in range(4):
            self._say(Request.GET_VRING_BASE, VRING_STATE.pack(index, self._source.bits(16)))
        transport.write(Register.STATUS, 4, 0)

    def _reset_queue(self, transport: MmioTransport) -> None:
        self._say(Request.GET_VRING_BASE, VRING_STATE.pack(0, 0))
        transport.write(Register.QUEUE_SEL, 4, 0)
        transport.write(Register.QUEUE_RESET, 4, 1)
        for request in RING_REQUESTS:
            self._say(request, U64.pack(0))
        transport.write(Register.QUEUE_READY, 4, 1)

    def _refresh(self, device: VhostUserBlock, transport: MmioTransport) -> None:
        self._say_space()
        if device.refresh():
            transport.config_changed()

    # What the back end says

    def _say_space(self) -> None:
        source = self._source
        space = config_space(sectors=source.pick((64, 0, 1 << 60)), queues=source.pick((4, 0, 9)),
                             seg_max=source.pick((126, 0, 0xFFFF_FFFF)))
        self._say(Request.GET_CONFIG, CONFIG.pack(0, len(space), 0) + space)

    def _say_anything(self) -> None:
        self._say(self._source.pick(_REQUESTS), self._source.take(self._source.bits(5)))

    def _say(self, request: int, payload: bytes) -> None:
        """Answer ``request``, most often as one should."""
        source = self._source
        flags, fds = VERSION | REPLY, 0
        size = len(payload)
        if source.chance(20):
            match source.number(0, 6):
                case 0:
                    request = source.pick(_REQUESTS)
                case 1:
                    flags = source.bits(8)
                case 2:
                    payload = source.take(source.bits(7))
                    size = len(payload)
                case 3:
                    size = source.edge(size, 4096, bits=32)
                case 4:
                    fds = source.number(1, 10)
                case 5:
                    return  # never
                case 6:
                    payload = U64.pack(source.bits(64)) if len(payload) == 8 else payload
        message = struct.pack("=III", request, flags, size) + payload
        with contextlib.suppress(OSError):  # we have hung up
            self._send(message, [self._fds[0]] * fds)

    def _send(self, message: bytes, fds: list[int]) -> None:
        self._peer.sock.setblocking(False)
        send_raw(self._peer.sock, message, fds)


def _ignore(line: str) -> None:
    assert line.isprintable(), line


def make() -> Target:
    """Return the target."""
    return FrontendTarget()
