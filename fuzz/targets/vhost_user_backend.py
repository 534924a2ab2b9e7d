"""Our export and a wicked front end: messages, file descriptors, and rings behind them"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fuzz.source import Source
from fuzz.target import Target
from pyvmm.vhost_user.protocol import (
    CONFIG,
    MEM_REGION,
    MEM_TABLE,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    SINGLE_MEM_REGION,
    U64,
    VRING_ADDR,
    VRING_STATE,
    MemoryRegion,
    Request,
)
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.ring.rings import first_base
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.vhost_rig import (
    ALL_PROTOCOL,
    FEATURES,
    PACKED,
    RAM_BYTES,
    SEALS,
    USER_BASE,
    ExportRig,
    ScriptedFrontend,
    held,
    memfd,
)
from tests.support.virtio_driver import RAM_BASE, BlockDriver

_REQUESTS = tuple(int(request) for request in Request)
_MOST_STEPS = 60
_RING_REQUESTS = tuple(int(request) for request in (
    Request.SET_VRING_NUM, Request.SET_VRING_ADDR, Request.SET_VRING_BASE, Request.GET_VRING_BASE,
    Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR,
    Request.SET_VRING_ENABLE,
))
_VRING_STATES = {
    int(request) for request in (
        Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.GET_VRING_BASE,
        Request.SET_VRING_ENABLE,
    )
}
_VRING_FDS = {
    int(request)
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
}


class BackendTarget(Target):
    """One front end does anything at all; the server goes on, and keeps nothing of it."""

    is_structured = True
    is_guided = True
    max_bytes = 1024
    limit_s = 4.0

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="pyvmm-fuzz-")

    def run(self, data: bytes) -> None:
        """Be the front end that ``data`` describes; then a good one comes, and is served."""
        source = Source(data)
        config = BlockConfig(queues=source.pick((2, 1, 8)), queue_size=16,
                             read_only=source.chance(64))
        before = held()
        path = Path(self._folder) / "export.sock"
        with ExportRig(path, config=config, trust_memory=source.chance(64)) as rig:
            size = len(rig.disk)
            with _Wicked(rig, source) as wicked:
                wicked.act()
            rig.turn()
            assert len(rig.disk) == size, "the disk's size has changed"
            assert len(rig.reports) < 10 * _MOST_STEPS
            good = rig.connect()
            driver = good.start(int(Feature.VERSION_1))
            answer = driver.request(0, 1, room=512)
            assert answer == (0, 513, bytes(rig.disk[512:1024])), answer
        assert held() == before, "descriptors or memory were left behind"

    def close(self) -> None:
        """See ``Target.close``."""
        shutil.rmtree(self._folder, ignore_errors=True)


class _Wicked:
    """A front end that begins well, mostly, and then does what ``source`` says."""

    def __init__(self, rig: ExportRig, source: Source) -> None:
        self._rig = rig
        self._source = source
        self._frontend: ScriptedFrontend = rig.connect()
        self._driver: BlockDriver | None = None
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._frontend.close)

    def __enter__(self) -> _Wicked:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._rig.turn()

    def act(self) -> None:
        """Do it."""
        source, frontend = self._source, self._frontend
        frontend.socket.setblocking(False)
        if not source.chance(32):
            self._begin_well()
        for _ in range(_MOST_STEPS):
            if not source.more:
                return
            match source.number(0, 7):
                case 0 | 1 | 2:
                    self._say(source.pick(_REQUESTS))
                case 3:
                    self._say(source.pick(_RING_REQUESTS))
                case 4:
                    self._write_ram()
                case 5:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_write(frontend.kick_fds[source.number(0, 7)], 1)
                    self._turn()
                case 6:
                    self._raw()
                case 7:
                    self._event()

    def _begin_well(self) -> None:
        """Negotiate, share memory and start ring 0, without waiting for any answer."""
        source, frontend = self._source, self._frontend
        features = source.pick((FEATURES, PACKED)) | int(
            source.pick((0, Feature.EVENT_IDX, BlockFeature.CONFIG_WCE)))
        frontend.negotiate(features, ALL_PROTOCOL)
        region = SINGLE_MEM_REGION.pack(*frontend.region)
        frontend.send(Request.ADD_MEM_REG, region, [frontend.ram_fd])
        driver = self._driver = frontend.driver()
        frontend.send(Request.SET_VRING_NUM, VRING_STATE.pack(0, driver.size))
        frontend.send(Request.SET_VRING_BASE, VRING_STATE.pack(0, first_base(features)))
        frontend.send(Request.SET_VRING_ADDR, frontend.addresses(driver))
        frontend.send(Request.SET_VRING_CALL, U64.pack(0), [frontend.call_fds[0]])
        frontend.send(Request.SET_VRING_KICK, U64.pack(0), [frontend.kick_fds[0]])
        frontend.send(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1))

    # Messages

    def _say(self, request: int) -> None:
        """Send ``request`` with a payload of its kind, or nearly."""
        source = self._source
        payload = self._payload(request)
        if source.chance(24):
            payload = payload[: source.bits(6)] + source.take(source.bits(3))
        with self._fds(request) as fds:
            flags = NEED_REPLY if source.chance(160) else 0
            if source.chance(8):
                flags = source.bits(8)
            self._send(struct.pack("=III", request, flags | 1, len(payload)) + payload, fds)

    def _payload(self, request: int) -> bytes:
        source = self._source
        index = source.pick((0, 0, 1, 7, 8, 255))
        if request in _VRING_STATES:
            return VRING_STATE.pack(index, source.edge(16, 0, 1, 0x8000_8000, bits=32))
        if request in _VRING_FDS:
            return U64.pack(index | source.pick((0, 0, 0, 256, 1 << 63)))
        match request:
            case Request.SET_FEATURES:
                return U64.pack(source.edge(FEATURES | PROTOCOL_FEATURES, PACKED, FEATURES))
            case Request.SET_PROTOCOL_FEATURES:
                return U64.pack(source.edge(ALL_PROTOCOL, 0, bits=18))
            case Request.SET_VRING_ADDR:
                areas = [self._address() for _ in range(3)]
                return VRING_ADDR.pack(index, source.bits(1), *areas, 0)
            case Request.ADD_MEM_REG | Request.REM_MEM_REG:
                return SINGLE_MEM_REGION.pack(*self._region())
            case Request.SET_MEM_TABLE:
                count = source.pick((1, 2, 0, 8, 9))
                regions = b"".join(MEM_REGION.pack(*self._region()) for _ in range(min(count, 8)))
                return MEM_TABLE.pack(count, 0) + regions
            case Request.GET_CONFIG | Request.SET_CONFIG:
                size = source.pick((60, 1, 0, 256, 257))
                offset = source.edge(0, 32, 255, bits=32)
                return CONFIG.pack(offset, size, source.bits(1)) + source.take(size).ljust(
                    size, b"\1")
            case Request.SET_VRING_ENDIAN | Request.SET_STATUS:
                return U64.pack(source.bits(8))
            case _:
                return source.take(8) if source.chance(32) else b""

    def _address(self) -> int:
        return self._source.edge(USER_BASE, USER_BASE + 0x1000, USER_BASE + 0x2000,
                                 USER_BASE + RAM_BYTES - 16, USER_BASE + RAM_BYTES)

    def _region(self) -> MemoryRegion:
        source = self._source
        if source.chance(96):
            return self._frontend.region
        return MemoryRegion(
            source.edge(RAM_BASE, RAM_BASE + RAM_BYTES, RAM_BASE + 4096),
            source.edge(RAM_BYTES, 4096, 0), source.edge(USER_BASE, USER_BASE + RAM_BYTES),
            source.edge(0, 4096, RAM_BYTES),
        )

    @contextlib.contextmanager
    def _fds(self, request: int) -> Iterator[list[int]]:
        """File descriptors that go with ``request``, or others."""
        source, frontend = self._source, self._frontend
        fds: list[int] = []
        count = 0
        if request in _VRING_FDS or request in (Request.ADD_MEM_REG, Request.SET_BACKEND_REQ_FD):
            count = 1
        elif request == Request.SET_MEM_TABLE:
            count = 1 + source.bits(1)
        if source.chance(24):
            count = source.number(0, 10)
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                kind = source.number(0, 15)
                if kind < 8:
                    good = {Request.SET_VRING_KICK: frontend.kick_fds,
                            Request.SET_VRING_CALL: frontend.call_fds}
                    fds.append(good.get(Request(request), [frontend.ram_fd])[0])
                elif kind < 10:
                    fds.append(frontend.kick_fds[source.bits(3)])
                else:
                    fds += _odd_fds(kind, source, stack)
            yield fds[:12]

    def _raw(self) -> None:
        """Bytes that need be no message."""
        source = self._source
        data = source.take(source.bits(6))
        if source.chance(64):
            data = struct.pack("=III", source.pick(_REQUESTS), 1, source.bits(13)) + data
        self._send(data, [])

    def _send(self, data: bytes, fds: list[int]) -> None:
        sock = self._frontend.socket
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
        with contextlib.suppress(OSError):  # it has hung up, or reads nothing
            sock.sendmsg([data], ancillary if fds else [])
        self._turn()
        if not self._source.chance(32):  # else its answers pile up
            with contextlib.suppress(OSError):
                while sock.recv(65536):
                    pass

    def _turn(self) -> None:
        self._rig.turn()

    # Memory and time

    def _write_ram(self) -> None:
        """Offer a chain as drivers do, or write anything anywhere."""
        source, frontend, driver = self._source, self._frontend, self._driver
        if driver is None or source.chance(96):
            at = source.number(0, 0x1800) if source.chance(224) else source.number(0, RAM_BYTES)
            piece = source.take(source.bits(6))
            at = min(at, RAM_BYTES - len(piece))
            frontend.map[at : at + len(piece)] = piece
            return
        if driver._top > RAM_BASE + RAM_BYTES // 2:
            return
        kind, sector = source.pick((0, 1, 4, 8, 11, 13)), source.bits(6)
        with contextlib.suppress(AssertionError):  # the server owes this front end nothing
            driver.request(kind, sector, room=512 if kind in (0, 8) else 0,
                           data=bytes(512) if kind == 1 else b"")

    def _event(self) -> None:
        """Time goes by, the disk changes, one end shuts down."""
        source, rig = self._source, self._rig
        match source.number(0, 4):
            case 0:
                rig.now_s += source.bits(8) / 8
            case 1:
                rig.server.config_changed()
            case 2 if source.chance(32):
                with contextlib.suppress(OSError):
                    self._frontend.socket.shutdown(source.number(0, 2))
            case 3:
                with contextlib.suppress(OSError, ValueError):
                    os.ftruncate(self._frontend.ram_fd, 0)  # sealed, or a region that shrinks
            case _:
                pass
        self._turn()


def _odd_fds(kind: int, source: Source, stack: contextlib.ExitStack) -> list[int]:
    """Descriptors of kinds that nobody should send."""
    def kept(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    match kind:
        case 10:
            return [kept(memfd(source.pick((4096, RAM_BYTES, 1)), source.pick((SEALS, 0))))]
        case 11:
            reader, writer = os.pipe()
            return [kept(reader), kept(writer)]
        case 12:
            ours, theirs = socket.socketpair()
            fds = [kept(ours.detach()), kept(theirs.detach())]
            if source.chance(64):
                os.write(fds[1], b"said before")
            return fds[:1]
        case 13:
            return [kept(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))]
        case 14:
            fd = kept(memfd(RAM_BYTES, 0))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            return [fd]
        case _:
            return [kept(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))]


def make() -> Target:
    """Return the target."""
    return BackendTarget()
