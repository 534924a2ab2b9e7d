"""A virtio device of any kind behind its transport, made anew for every case, and its judge.

What must hold whatever the driver does: no exception comes out, the disk keeps its size and is
touched on its sectors only, a pass is short, and after a reset the device works.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

from fuzz.block_model import SERIAL
from fuzz.source import Source
from pyvmm.errors import PeerClosedError, RequestRefusedError, VhostUserError
from pyvmm.memory import GuestMemory
from pyvmm.storage.memory import MemoryBackend
from pyvmm.vhost_user.block import VhostUserBlock
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.console.device import RECEIVE_QUEUE, TRANSMIT_QUEUE, ConsoleDevice
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.port.device import CONTROL_TRANSMIT, RECEIVE, TRANSMIT, PortDevice
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BlockFeature, Feature, Register, Status
from tests.support.general_path import GeneralBlockDevice
from tests.support.vhost_user_disk import EventfdSlot
from tests.support.virtio_driver import RAM_BASE, BlockDriver, VirtioDriver, readable, writable

RAM_BYTES = 256 << 10
RAM_END = RAM_BASE + RAM_BYTES
DISK_SECTORS = 64
DISK = b"".join(bytes([number]) * 512 for number in range(DISK_SECTORS))
KINDS = ("block", "block", "console", "entropy", "served", "port")
PASS_CPU_S = 0.5
"""A pass is promised to take under 0.1 s; the rest is for atheris and busy machines."""
_MOST_TURNS = 5000  # a full ring, at a chain a pass
_OFFERED = int(
    Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED
    | Feature.RING_RESET | BlockFeature.FLUSH | BlockFeature.MQ | BlockFeature.CONFIG_WCE
    | BlockFeature.SEG_MAX | BlockFeature.SIZE_MAX
)


class GuardedBackend(MemoryBackend):
    """A disk in memory that knows when it is asked for what its contract excludes."""

    def __init__(self, disk: bytearray) -> None:
        super().__init__(disk)
        self._disk = disk
        self.flushes = 0

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``."""
        self._check(offset, sum(map(len, buffers)))
        super().readv(buffers, offset)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``."""
        self._check(offset, sum(map(len, buffers)))
        super().writev(buffers, offset, durable=durable)

    def discard(self, offset: int, length: int) -> None:
        """Fill with what no model expects: a discarded byte may read as anything."""
        self._check(offset, length)
        self._disk[offset : offset + length] = b"\xdd" * length

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``."""
        self._check(offset, length)
        self._disk[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        """See ``BlockBackend.flush``."""
        self.flushes += 1

    def _check(self, offset: int, length: int) -> None:
        assert offset >= 0, f"{length} bytes at {offset}"
        assert length > 0, f"{length} bytes at {offset}"
        assert offset % 512 == length % 512 == 0, f"{length} bytes at {offset}"
        assert offset + length <= len(self._disk), f"{length} bytes at {offset}"


class FakeFrontend:
    """A vhost-user back end as its front end shows it: ``source`` decides what it refuses."""

    peer = "/run/fuzz.sock"
    stop_timeout_s = 1.0

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lost = False
        self.is_kind = True
        self.features = _OFFERED & ~source.bits(64) | int(Feature.VERSION_1)
        self.max_queues = source.number(1, 4)

    def fileno(self) -> int:
        """See ``Frontend.fileno``: nobody waits for it here."""
        return -1

    def get_config(self, offset: int, length: int) -> bytes:
        """See ``Frontend.get_config``."""
        self._act()
        space = bytearray(self._source.take(length).ljust(length, b"\1"))
        return bytes(space)

    def set_config(self, offset: int, data: bytes) -> None:
        """See ``Frontend.set_config``."""
        self._act()

    def set_features(self, features: int) -> None:
        """See ``Frontend.set_features``."""
        self._act()

    def add_region(self, region: object, fd: int) -> None:
        """See ``Frontend.add_region``."""
        self._act()

    def start_queue(self, index: int, **_ring: int) -> None:
        """See ``Frontend.start_queue``."""
        self._act()

    def stop_queue(self, index: int) -> int:
        """See ``Frontend.stop_queue``: the one request that cannot be refused."""
        self._act(may_refuse=False)
        return self._source.bits(32)

    def check(self) -> None:
        """See ``Frontend.check``."""
        self._act(may_refuse=False)

    def _act(self, *, may_refuse: bool = True) -> None:
        """Do as it is told; or refuse; or be gone for ever."""
        if self.is_kind:
            return
        mood = self._source.bits(8)
        if self._lost or mood > 250:
            self._lost = True
            raise PeerClosedError(self.peer, "gone") if mood & 1 else VhostUserError(
                self.peer, "nonsense")
        if mood > 235 and may_refuse:
            raise RequestRefusedError(self.peer, "no")


class Machine:
    """One device of ``kind``; ``source`` chooses how it is configured."""

    def __init__(self, kind: str, source: Source, memory: GuestMemory, fds: Sequence[int]) -> None:
        self.kind = kind
        self.memory = memory
        self.now_s = 1000.0
        self.disk = bytearray(DISK)
        self.reports = 0
        self.interrupts = 0
        self.shown_bytes = 0
        self.frontend: FakeFrontend | None = None
        self.config = BlockConfig()
        self.device = self._make(source, fds)
        self.transport = MmioTransport(
            self.device, memory, self._interrupt, report=self._report, keep_used=source.chance(64)
        )
        self.queue_size = self.device.queue_max_sizes[0]

    def _make(self, source: Source, fds: Sequence[int]) -> VirtioDevice:
        if self.kind == "console":
            self.size = (80, 25)
            self.console = ConsoleDevice(
                self._show, lambda: None, size=lambda: self.size, clock=lambda: self.now_s
            )
            return self.console
        if self.kind == "entropy":
            return EntropyDevice()
        if self.kind == "port":
            self.appetite = 0
            self.port_is_open = False
            self.port = PortDevice()
            self.port.connect(
                on_data=self._hear, on_room=lambda: None, on_open=self._note_port
            )
            return self.port
        if self.kind == "served":
            self.frontend = FakeFrontend(source)
            device = VhostUserBlock(
                self.frontend,  # type: ignore[arg-type]
                max_queues=len(fds) - 1, lost=self._report, queue_size=source.pick((16, 256)),
            )
            device.plug(EventfdSlot(fds[0], tuple(fds[1:])))
            self.frontend.is_kind = False
            return device
        self.config = BlockConfig(
            read_only=source.chance(32), serial=SERIAL.decode(), queues=source.pick((1, 1, 2, 4)),
            queue_size=source.pick((16, 4, 8, 64, 256)), writeback=not source.chance(64),
            rate_limit=RateLimit(ops_per_s=source.bits(8), bytes_per_s=source.bits(16) << 8)
            if source.chance(48) else RateLimit(),
        )
        cls = GeneralBlockDevice if source.chance(64) else BlockDevice
        return cls(self.config, GuardedBackend(self.disk), clock=lambda: self.now_s)

    def _interrupt(self) -> None:
        self.interrupts += 1

    def _report(self, line: str) -> None:
        assert line.isprintable(), line
        self.reports += 1

    def _show(self, data: bytes) -> None:
        self.shown_bytes += len(data)

    def _hear(self, data: bytes) -> int:
        assert self.port_is_open
        assert 0 < len(data) <= 64 << 10
        taken = min(self.appetite, len(data))
        self.appetite -= taken
        return taken

    def _note_port(self, is_open: bool) -> None:
        assert is_open != self.port_is_open
        self.port_is_open = is_open

    # What happens

    def write(self, offset: int, size: int, value: int) -> None:
        """The driver writes a register; a notification is a pass."""
        if offset != Register.QUEUE_NOTIFY:
            self.transport.write(offset, size, value)
            return
        begun_s = time.thread_time()
        self.transport.write(offset, size, value)
        self._check_pass(begun_s)

    def service(self, index: int) -> float | None:
        """A pass of the I/O thread."""
        begun_s = time.thread_time()
        delay_s = self.transport.service(index)
        self._check_pass(begun_s)
        assert delay_s is None or 0.0 <= delay_s <= 1.0, delay_s
        return delay_s

    def _check_pass(self, begun_s: float) -> None:
        taken_s = time.thread_time() - begun_s
        assert taken_s < PASS_CPU_S, f"a pass took {taken_s * 1000:.0f} ms"

    def serve_all(self, index: int) -> None:
        """Serve queue ``index`` until nothing is left; time passes where a rate limit wants it."""
        for _ in range(_MOST_TURNS):
            delay_s = self.service(index)
            if delay_s is None:
                return
            self.now_s += delay_s
        raise AssertionError(f"queue {index} finds no end")

    def host_event(self, source: Source) -> None:
        """Something happens on the host."""
        match source.number(0, 3):
            case 0 if self.kind == "console":
                self.console.receive(source.take(source.bits(6)))
                self.service(RECEIVE_QUEUE)
            case 0 if self.kind == "port":
                self.port.receive(source.take(source.bits(6)))
                self.service(RECEIVE)
            case 1 if self.kind == "port":
                self.port.hang_up()
                self.port.refresh()
            case 2 if self.kind == "port":
                self.appetite = source.bits(17)
                self.service(TRANSMIT)
            case 1 if self.kind == "console":
                self.size = (source.bits(17), source.bits(17))
                if self.console.refresh():
                    self.transport.config_changed()
            case 2 if isinstance(self.device, BlockDevice):
                self._resize_disk(source.pick((DISK_SECTORS, DISK_SECTORS // 2, 0, 100)))
            case 2 if isinstance(self.device, VhostUserBlock):
                self.device.look()
                self.device.refresh()
                self.transport.config_changed()
            case _:
                self.now_s += source.bits(8) / 16
                self.service(source.bits(2))

    def _resize_disk(self, sectors: int) -> None:
        """The disk's file grows or shrinks."""
        del self.disk[sectors * 512 :]
        self.disk.extend(bytes(sectors * 512 - len(self.disk)))
        assert isinstance(self.device, BlockDevice)
        self.device.refresh()
        self.transport.config_changed()

    # The end

    def check_works(self) -> None:
        """After a reset the device does what it is for."""
        if self.frontend is not None:
            self.transport.write(Register.STATUS, 4, 0)
            assert self.transport.read(Register.STATUS, 4) == 0
            return
        if self.kind == "block":
            self._resize_disk(DISK_SECTORS)
            driver = BlockDriver(self.transport, self.memory, size=min(16, self.queue_size))
            driver.start()
            wanted = bytes(self.disk[512:1024])
            got = self._ask_block(driver)
            assert got == (0, 513, wanted), (got, wanted)
            return
        index = {"console": TRANSMIT_QUEUE, "port": CONTROL_TRANSMIT}.get(self.kind, 0)
        plain = VirtioDriver(self.transport, self.memory, size=16, index=index)
        plain.start()
        shown = self.shown_bytes
        buffer = plain.put(bytes(64))
        plain.submit([readable(buffer, 64) if index else writable(buffer, 64)])
        self.serve_all(index)
        (used,) = plain.reap()
        assert used.length == (0 if index else 64), used
        assert self.shown_bytes - shown == (64 if self.kind == "console" else 0)

    def _ask_block(self, driver: BlockDriver) -> tuple[int, int, bytes]:
        """Read a sector, however long the rate limit makes it wait."""
        status, buffer = driver.status_byte(), driver.alloc(512, 1)
        driver.submit([readable(driver.header(0, 1), 16), writable(buffer, 512),
                       writable(status, 1)])
        self.serve_all(0)
        (used,) = driver.reap()
        return self.memory.read_int(status, 1), used.length, self.memory.read(buffer, 512)

    def close(self) -> None:
        """Reset the device, whatever state it is in, and drop its page."""
        self.transport.write(Register.STATUS, 4, 0)
        assert self.transport.read(Register.STATUS, 4) == Status(0)
        self.transport.close()


class Bench:
    """Parts that every machine uses again: the RAM, the eventfds of a served disk."""

    def __init__(self) -> None:
        self.memory = GuestMemory([(RAM_BASE, RAM_BYTES)], shared=True)
        self._fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(5)]

    def machine(self, kind: str, source: Source) -> Machine:
        """Return a machine over empty RAM."""
        self.memory.write(RAM_BASE, bytes(RAM_BYTES))
        return Machine(kind, source, self.memory, self._fds)

    def close(self) -> None:
        """Free it all; idempotent."""
        while self._fds:
            os.close(self._fds.pop())
        with contextlib.suppress(BufferError):  # a device that a finding has left as it was
            self.memory.close()
