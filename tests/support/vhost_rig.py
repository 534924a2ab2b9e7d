"""Our export and a front end that says exactly what a test tells it to, in one thread.

``ExportRig`` has the server of a disk and turns its crank; ``ScriptedFrontend`` is one connection
with memory of its own and, if asked, queues that the drivers of ``virtio_driver`` use.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from pyvmm.memory import GuestMemory
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.memory import MemoryBackend
from pyvmm.vhost_user.protocol import (
    NEED_REPLY,
    PROTOCOL_FEATURES,
    REPLY,
    SINGLE_MEM_REGION,
    U64,
    VERSION,
    VRING_ADDR,
    VRING_STATE,
    MemoryRegion,
    ProtocolFeature,
    Request,
)
from pyvmm.vhost_user.server import Server
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.ring.rings import first_base
from pyvmm.virtio.spec import BlockFeature, Feature, Register
from tests.support.packed_driver import PackedDriver
from tests.support.patience import patient
from tests.support.virtio_driver import RAM_BASE, BlockDriver

RAM_BYTES = 1 << 20
USER_BASE = 0x7F00_0000_0000
"""User address of the first byte of RAM: what a mix-up with RAM_BASE would be seen by."""
FEATURES = int(Feature.VERSION_1 | Feature.INDIRECT_DESC | BlockFeature.FLUSH | BlockFeature.MQ)
PACKED = FEATURES | int(Feature.RING_PACKED)
ALL_PROTOCOL = int(
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
QUEUE_SIZE = 16
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_HEADER = struct.Struct("=III")


def open_fds() -> list[str]:
    """Every open descriptor of this process, with what it refers to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{name} {Path(f'/proc/self/fd/{name}').readlink()}")
    return sorted(found)


def held() -> tuple[list[str], int]:
    """What a test may not leave behind: descriptors, and mappings of a front end's memory."""
    return open_fds(), Path("/proc/self/maps").read_text().count("memfd:peer-ram")


def memfd(length: int, seals: int = SEALS) -> int:
    """A memfd of ``length`` bytes."""
    fd = os.memfd_create("peer-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, length)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Doorbell:
    """What a test driver takes for registers: QueueNotify is a kick."""

    def __init__(self, frontend: ScriptedFrontend) -> None:
        self._frontend = frontend

    def read(self, offset: int, size: int) -> int:
        """There is nothing to read: status 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Kick queue ``value`` and let the server work."""
        if offset != Register.QUEUE_NOTIFY:
            raise AssertionError(f"register {offset:#x} written")
        self._frontend.kick(value)


class ScriptedFrontend:
    """One connection.  Messages are raw; ``start`` and ``driver`` are for those that want I/O."""

    def __init__(self, rig: ExportRig) -> None:
        self.rig = rig
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(patient(2))
        self.socket.connect(rig.path)
        self.ram_fd = memfd(RAM_BYTES)
        self.map = mmap.mmap(self.ram_fd, RAM_BYTES)
        self.memory = GuestMemory.over(self.map, RAM_BASE)
        self.region = MemoryRegion(RAM_BASE, RAM_BYTES, USER_BASE, 0)
        self.kick_fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
        self.call_fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
        self.features = 0
        rig.turn()

    # Bytes

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send ``data``, whatever it is, and let the server work."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendmsg([data], ancillary)
        self.rig.turn()

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0
    ) -> None:
        """Send one message."""
        self.raw(_HEADER.pack(request, flags | VERSION, len(payload)) + payload, fds)

    def reply(self, request: int) -> bytes:
        """The payload of the reply that has come to ``request``."""
        header = self.socket.recv(_HEADER.size, socket.MSG_WAITALL)
        got, flags, size = _HEADER.unpack(header)
        assert (got, flags) == (request, VERSION | REPLY)
        return self.socket.recv(size, socket.MSG_WAITALL) if size else b""

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request that has a reply of its own."""
        self.send(request, payload, fds)
        return self.reply(request)

    def ack(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A request with its acknowledgement: 0 for success."""
        self.send(request, payload, fds, flags=NEED_REPLY)
        number: int = U64.unpack(self.reply(request))[0]
        return number

    def is_closed(self) -> bool:
        """Whether the server has hung up; what it said before is thrown away."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(4096):
                pass
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        finally:
            self.socket.settimeout(patient(2))
        return True

    # A front end that knows how

    def negotiate(self, features: int = FEATURES, protocol: int = ALL_PROTOCOL) -> None:
        """Up to where memory comes."""
        self.send(Request.SET_OWNER)
        self.send(Request.SET_PROTOCOL_FEATURES, U64.pack(protocol))
        self.send(Request.SET_FEATURES, U64.pack(features | PROTOCOL_FEATURES))
        self.features = features

    def share(self) -> None:
        """Give the RAM."""
        region = SINGLE_MEM_REGION.pack(*self.region)
        assert self.ack(Request.ADD_MEM_REG, region, [self.ram_fd]) == 0

    def driver(self, index: int = 0, size: int = QUEUE_SIZE) -> BlockDriver:
        """A driver whose ring is not yet known to the server; one at a time uses the RAM."""
        kind = PackedDriver if self.features & Feature.RING_PACKED else BlockDriver
        return kind(Doorbell(self), self.memory, size=size, index=index)

    def set_up(self, driver: BlockDriver, base: int | None = None) -> None:
        """Size, addresses and base of the ring of ``driver``."""
        index = driver.index
        assert self.ack(Request.SET_VRING_NUM, VRING_STATE.pack(index, driver.size)) == 0
        assert self.ack(
            Request.SET_VRING_BASE,
            VRING_STATE.pack(index, first_base(self.features) if base is None else base),
        ) == 0
        assert self.ack(Request.SET_VRING_ADDR, self.addresses(driver)) == 0

    def addresses(self, driver: BlockDriver) -> bytes:
        """The payload of SET_VRING_ADDR for the ring of ``driver``."""
        user = [gpa - RAM_BASE + USER_BASE for gpa in (driver.desc, driver.used, driver.avail)]
        return VRING_ADDR.pack(driver.index, 0, *user, 0)

    def run(self, index: int = 0) -> None:
        """Call, kick and enable ring ``index``."""
        for request, fds in (
            (Request.SET_VRING_CALL, self.call_fds), (Request.SET_VRING_KICK, self.kick_fds)
        ):
            assert self.ack(request, U64.pack(index), [fds[index]]) == 0
        assert self.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, 1)) == 0

    def start(self, features: int = FEATURES, size: int = QUEUE_SIZE) -> BlockDriver:
        """All of it, for ring 0; its driver."""
        self.negotiate(features)
        self.share()
        driver = self.driver(size=size)
        self.set_up(driver)
        self.run()
        return driver

    def stop(self, index: int = 0) -> int:
        """GET_VRING_BASE: the base."""
        got, base = VRING_STATE.unpack(
            self.ask(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0))
        )
        assert got == index
        return int(base)

    def kick(self, index: int = 0) -> None:
        """Write the kick eventfd and let the server work."""
        os.eventfd_write(self.kick_fds[index], 1)
        self.rig.turn()

    def calls(self, index: int = 0) -> int:
        """How often the server has written the call eventfd since the last look."""
        try:
            return os.eventfd_read(self.call_fds[index])
        except BlockingIOError:
            return 0

    def hang_up(self) -> None:
        """Close the connection alone and let the server notice."""
        self.socket.close()
        self.rig.turn()

    def close(self) -> None:
        """Close everything; idempotent."""
        self.socket.close()
        if not self.map.closed:
            self.memory.close()
            self.map.close()
            os.close(self.ram_fd)
            for fd in (*self.kick_fds, *self.call_fds):
                os.close(fd)


class ExportRig:
    """The server of one disk of 64 sectors, sector i full of byte i, in memory."""

    def __init__(
        self,
        path: Path,
        *,
        config: BlockConfig | None = None,
        backend: BlockBackend | None = None,
        trust_memory: bool = False,
        device_type: type[BlockDevice] = BlockDevice,
    ) -> None:
        self.path = str(path)
        self.disk = bytearray(b"".join(bytes([i]) * 512 for i in range(64)))
        self.backend: BlockBackend = backend or MemoryBackend(self.disk)
        self.config = config or BlockConfig(queues=8, queue_size=QUEUE_SIZE)
        self.reports: list[str] = []
        self.notes: list[str] = []
        self.now_s = 1000.0
        self.delay_s: float | None = None
        self._frontends: list[ScriptedFrontend] = []
        self.devices: list[BlockDevice] = []
        """One for every front end that came."""
        self._device_type = device_type
        self._trust_memory = trust_memory
        self.server = self._new_server()

    def _new_server(self) -> Server:
        return Server(
            self.path,
            self._new_device,
            exclusive=not self.config.read_only,
            report=self.reports.append,
            note=self.notes.append,
            trust_memory=self._trust_memory,
            clock=lambda: self.now_s,
        )

    def _new_device(self) -> BlockDevice:
        device = self._device_type(self.config, self.backend, clock=lambda: self.now_s)
        self.devices.append(device)
        return device

    def restart(self) -> None:
        """End the server, with every connection, and start another."""
        self.server.close()
        self.server = self._new_server()

    def turn(self) -> None:
        """Let the server work until nothing is left to do, or it asks to wait."""
        for _ in range(2000):
            self.delay_s = self.server.service()
            if self.delay_s != 0.0 and not self._is_readable():
                return
        raise AssertionError("the server finds no end")

    def waits_for_ever(self) -> bool:
        """Whether nothing but an event will make the server go on."""
        return self.delay_s is None

    def _is_readable(self) -> bool:
        poller = select.poll()
        poller.register(self.server.fileno(), select.POLLIN)
        return bool(poller.poll(0))

    def connect(self) -> ScriptedFrontend:
        """One more front end."""
        self._frontends.append(ScriptedFrontend(self))
        return self._frontends[-1]

    def close(self) -> None:
        """Close the front ends, then the server."""
        for frontend in self._frontends:
            frontend.close()
        self.server.close()
        self.backend.close()

    def __enter__(self) -> ExportRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
