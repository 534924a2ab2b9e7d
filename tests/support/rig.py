"""A block device behind a transport, over a bytearray and a real file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyvmm.memory import GuestMemory
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.raw import RawBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import InterruptBit, Register
from tests.support.virtio_driver import RAM_BASE, BlockDriver

RAM_BYTES = 1 << 20
DISK_SECTORS = 64


class Hooked:
    """A backend in front of another: a test replaces the method it wants to go wrong."""

    block_size = 512
    extra_calls = 0
    merges = False

    def __init__(self, backend: BlockBackend) -> None:
        self.backend = backend
        self.read_only = backend.read_only
        self.can_discard = backend.can_discard
        self.can_write_zeroes = backend.can_write_zeroes

    @property
    def size_bytes(self) -> int:
        return self.backend.size_bytes

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.backend.readv(buffers, offset)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        self.backend.writev(buffers, offset, durable=durable)

    def flush(self) -> None:
        self.backend.flush()

    def discard(self, offset: int, length: int) -> None:
        self.backend.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.backend.write_zeroes(offset, length, unmap=unmap)

    def refresh_size(self) -> int:
        return self.backend.refresh_size()

    def hurry(self, until_s: float) -> None:
        self.backend.hurry(until_s)

    def close(self) -> None:
        self.backend.close()


@dataclass
class Rig:
    """The machine around one block device; interrupts are counted, reports kept."""

    path: Path
    ram: bytearray
    memory: GuestMemory
    backend: BlockBackend
    device: BlockDevice
    transport: MmioTransport
    driver: BlockDriver
    irqs: list[int]
    keep_used: bool
    reports: list[str] = field(default_factory=list)

    @property
    def disk(self) -> bytes:
        """The image file as it is now."""
        return self.path.read_bytes()

    @property
    def kept(self) -> int:
        """What InterruptStatus says while the device runs and nothing is pending."""
        return InterruptBit.USED_BUFFER if self.keep_used else 0

    def interrupt_status(self) -> int:
        """InterruptStatus, acknowledged."""
        status = self.driver.reg(Register.INTERRUPT_STATUS)
        self.driver.set(Register.INTERRUPT_ACK, status)
        return status

    def assert_needs_reset(self) -> None:
        """Outcome N: the bit, the config interrupt, a report, nothing served - and after a
        reset everything works."""
        driver = self.driver
        assert driver.needs_reset
        assert self.interrupt_status() & InterruptBit.CONFIG_CHANGE
        assert len(self.reports) == 1
        used = self.memory.read_int(driver.used + 2, 2)
        driver.notify()
        assert self.memory.read_int(driver.used + 2, 2) == used
        self.assert_works()

    def assert_works(self) -> None:
        """After a reset the device serves a read."""
        self.driver.start()
        assert self.interrupt_status() == self.kept
        answer = self.driver.request(0, 1, room=512)
        assert answer == (0, 513, self.disk[512:1024])


def make_rig(
    path: Path,
    *,
    config: BlockConfig | None = None,
    backend: BlockBackend | None = None,
    queue_size: int = 16,
    ram_bytes: int = RAM_BYTES,
    keep_used: bool = False,
    device_type: type[BlockDevice] = BlockDevice,
) -> Rig:
    """A rig over ``path``, which is made if missing; ``backend`` stands in for a raw file."""
    if not path.exists():
        path.write_bytes(b"".join(bytes([i]) * 512 for i in range(DISK_SECTORS)))
    reports: list[str] = []
    irqs: list[int] = []
    ram = bytearray(ram_bytes)
    memory = GuestMemory.over(ram, RAM_BASE)
    if backend is None:
        backend = RawBackend(str(path), report=reports.append)
    device = device_type(config or BlockConfig(queue_size=queue_size), backend)
    transport = MmioTransport(
        device,
        memory,
        lambda: irqs.append(len(irqs)),
        report=reports.append,
        keep_used=keep_used,
    )
    driver = BlockDriver(transport, memory, size=queue_size)
    return Rig(path, ram, memory, backend, device, transport, driver, irqs, keep_used, reports)
