"""Both ends of the driver half: a disk of our own in process, and a device that does nothing by
itself, whose part a test plays."""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from pyvmm.driver import Completion, SharedMemory, Transport, VirtioBlkQueue
from pyvmm.driver.in_process import InProcessTransport
from pyvmm.driver.queue import DRIVER_FEATURES
from pyvmm.driver.transport import MappedRegion, QueueLayout
from pyvmm.memory import GuestMemory, Region
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.spec import BlockFeature, Feature

DISK_SECTORS = 64
DATA_BYTES = 1 << 20


class RingKind(NamedTuple):
    """What a queue can be made of."""

    packed: bool
    indirect: bool
    event_idx: bool

    @property
    def features(self) -> int:
        """All a driver knows, but for what this kind has not."""
        features = DRIVER_FEATURES
        for has, feature in zip(
            self, (Feature.RING_PACKED, Feature.INDIRECT_DESC, Feature.EVENT_IDX), strict=True
        ):
            if not has:
                features &= ~int(feature)
        return features

    def __str__(self) -> str:
        return "-".join(
            (
                "packed" if self.packed else "split",
                "indirect" if self.indirect else "direct",
                "event_idx" if self.event_idx else "flags",
            )
        )


RING_KINDS = [
    RingKind(packed, indirect, event_idx)
    for packed in (False, True)
    for indirect in (False, True)
    for event_idx in (False, True)
]
SPLIT = RingKind(packed=False, indirect=True, event_idx=False)
PACKED = RingKind(packed=True, indirect=True, event_idx=False)


def pattern(sector: int) -> bytes:
    """What is in a sector of a fresh disk."""
    return bytes([sector + 1]) * 512


def is_readable(fd: int) -> bool:
    """Whether ``fd`` is, now."""
    return bool(select.select([fd], [], [], 0)[0])


def open_fds() -> int:
    """How many file descriptors the process has."""
    return len(os.listdir("/proc/self/fd"))


class DiskRig:
    """A disk in memory, our device over it, the driver's queues in front, data to share."""

    def __init__(
        self,
        kind: RingKind = SPLIT,
        *,
        queues: int = 1,
        queue_size: int = 16,
        config: BlockConfig | None = None,
        backend: BlockBackend | None = None,
    ) -> None:
        self.disk = bytearray(b"".join(pattern(i) for i in range(DISK_SECTORS)))
        self.device = BlockDevice(
            config or BlockConfig(queues=queues, queue_size=256, serial="rig"),
            backend or MemoryBackend(self.disk),
        )
        self.transport = InProcessTransport(self.device)
        self.data = SharedMemory(DATA_BYTES)
        self.transport.map_mem_region(self.data.address, self.data.length, self.data.fd)
        self.queues = VirtioBlkQueue.setup_queues(
            self.transport, queues, queue_size, features=kind.features
        )

    @property
    def queue(self) -> VirtioBlkQueue:
        """The first queue."""
        return self.queues[0]

    def finish(self, index: int = 0) -> list[Completion]:
        """Notify if the device wants it, and collect."""
        if self.queues[index].avail_notif_needed():
            self.transport.notify(index)
        return list(self.queues[index].completions())

    def data_at(self, offset: int, length: int) -> bytes:
        """A copy of some of the shared data."""
        return bytes(self.data.view[offset : offset + length])

    def interrupted(self, index: int = 0) -> bool:
        """Whether there was an interrupt since the last call."""
        fd = self.transport.completion_fd(index)
        raised = is_readable(fd)
        if raised:
            os.eventfd_read(fd)
        return raised

    def __enter__(self) -> DiskRig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.transport.close()
        self.data.close()


class FakeTransport(Transport):
    """A device that offers what it is told to and then only keeps what it is given.

    ``ram`` is the memory as the device sees it; ``notified`` the queues of each notification.
    """

    max_queues = 2
    max_queue_size = 256
    max_mem_regions = 3

    def __init__(
        self, features: int = DRIVER_FEATURES & ~int(BlockFeature.RO), config: bytes = b""
    ) -> None:
        super().__init__()
        self.offered = features
        self.config = config or block_config()
        self.ram = GuestMemory.empty()
        self.notified: list[int] = []
        self.calls: list[str] = []
        self.refusal: Exception | None = None
        self._mappings: dict[int, tuple[Region, mmap.mmap]] = {}

    @property
    def features(self) -> int:
        return self.offered

    def get_config(self, offset: int, length: int) -> bytes:
        return self.config[offset : offset + length].ljust(length, b"\0")

    def notify(self, queue_index: int) -> None:
        self.notified.append(queue_index)

    def submission_fd(self, queue_index: int) -> int:
        raise NotImplementedError

    def completion_fd(self, queue_index: int) -> int:
        raise NotImplementedError

    def fileno(self) -> int:
        raise NotImplementedError

    def check(self) -> None:
        if self.refusal:
            raise self.refusal

    def _negotiate(self, features: int) -> None:
        self._called("negotiate")

    def _map_region(self, region: MappedRegion) -> None:
        self._called("map")
        mapping = mmap.mmap(region.fd, region.length, offset=region.offset)
        self._mappings[region.address] = self.ram.add(region.address, mapping), mapping

    def _unmap_region(self, region: MappedRegion) -> None:
        self._called("unmap")
        self._drop(region.address)

    def _setup_queues(self, queues: Sequence[QueueLayout]) -> None:
        self._called("setup_queues")

    def _stop(self) -> None:
        self.calls.append("stop")

    def _close(self) -> None:
        self.calls.append("close")
        for address in list(self._mappings):
            self._drop(address)

    def _drop(self, address: int) -> None:
        region, mapping = self._mappings.pop(address)
        self.ram.remove(region)
        mapping.close()

    def _called(self, name: str) -> None:
        self.check()
        self.calls.append(name)


def block_config(
    *,
    sectors: int = DISK_SECTORS,
    size_max: int = 4096,
    seg_max: int = 4,
    num_queues: int = 2,
    max_discard_sectors: int = 8,
    max_write_zeroes_sectors: int = 8,
) -> bytes:
    """The beginning of struct virtio_blk_config."""
    head = struct.pack("<QII", sectors, size_max, seg_max).ljust(34, b"\0")
    discard = struct.pack("<HIII", num_queues, max_discard_sectors, 1, 1)
    return head + discard + struct.pack("<II", max_write_zeroes_sectors, 1)


class FakeRig:
    """A driver's queues over a FakeTransport: the test is the device."""

    def __init__(
        self,
        kind: RingKind = SPLIT,
        *,
        queue_size: int = 8,
        config: bytes = b"",
    ) -> None:
        self.transport = FakeTransport(kind.features & ~int(BlockFeature.RO), config)
        self.data = SharedMemory(DATA_BYTES)
        self.transport.map_mem_region(self.data.address, self.data.length, self.data.fd)
        try:
            (self.queue,) = VirtioBlkQueue.setup_queues(self.transport, 1, queue_size)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        (self.layout,) = self.transport.queues
        self.size = queue_size
        self.used = 0

    @property
    def ram(self) -> GuestMemory:
        """Memory as the device sees it."""
        return self.transport.ram

    def submit(self, *contexts: object) -> None:
        """A read of sector 0 for each context."""
        for context in contexts:
            self.queue.read_raw(0, self.data.address, 512, context)

    def put_used(self, head: int) -> None:
        """Split ring: one used element."""
        at = self.layout.device + 4 + 8 * (self.used % self.size)
        self.ram.write(at, struct.pack("<II", head, 513))
        self.used += 1
        self.ram.write_int(self.layout.device + 2, 2, self.used & 0xFFFF)

    def put_used_descriptor(self, slot: int, buffer_id: int, wrap: int = 1) -> None:
        """Packed ring: a used descriptor."""
        flags = 1 << 7 | 1 << 15 if wrap else 0
        at = self.layout.descriptor + 16 * slot + 8
        self.ram.write(at, struct.pack("<IHH", 513, buffer_id, flags))

    def table_of(self, head: int, *, packed: bool = False) -> list[tuple[int, int, int, int]]:
        """The indirect table of the descriptor at ``head``, in the ring's own format."""
        at = self.layout.descriptor + 16 * head
        address, length = struct.unpack("<QI", self.ram.read(at, 12))
        return [
            (gpa, size, second, first) if packed else (gpa, size, first, second)
            for gpa, size, first, second in struct.iter_unpack(
                "<QIHH", self.ram.read(address, length)
            )
        ]

    def set_status(self, head: int, status: int) -> None:
        """Split ring: what the device writes into the request's last byte."""
        self.ram.write_int(self.table_of(head)[-1][0], 1, status)

    def __enter__(self) -> FakeRig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.transport.close()
        self.data.close()
