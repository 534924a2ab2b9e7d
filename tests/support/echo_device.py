"""A device that is not a disk, to test what all devices have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pyvmm.errors import ActivateError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.device import Interrupt, RingDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.ring.queue import Chain
from pyvmm.virtio.spec import DeviceType, Feature
from tests.support.virtio_driver import RAM_BASE


class EchoDevice(RingDevice):
    """Fills the first writable buffer with its length.  The configuration space can be written
    and can change; activation can be made to fail."""

    device_type: ClassVar[DeviceType] = DeviceType.BLOCK

    def __init__(self, features: int, queue_max_sizes: Sequence[int]) -> None:
        super().__init__(avail_features=features, queue_max_sizes=tuple(queue_max_sizes))
        self.config = bytearray(8)
        self.refuse_activation = False

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(self.config[offset : offset + length]).ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data
        del self.config[8:]

    def activate(self, memory: GuestMemory, interrupt: Interrupt) -> None:
        if self.refuse_activation:
            raise ActivateError("out of order")
        super().activate(memory, interrupt)

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        gpa, length = chain.writable[0]
        memory.write(gpa, bytes([length]) * length)
        return length


class EchoRig:
    """EchoDevice behind a transport; ``deferred`` are the queues it wants serviced later."""

    def __init__(
        self,
        features: int = int(Feature.VERSION_1),
        queue_max_sizes: Sequence[int] = (8, 4),
    ) -> None:
        self.device = EchoDevice(features, queue_max_sizes)
        self.memory = GuestMemory.over(bytearray(1 << 16), RAM_BASE)
        self.irqs: list[int] = []
        self.reports: list[str] = []
        self.deferred: list[int] = []
        self.transport = MmioTransport(
            self.device,
            self.memory,
            lambda: self.irqs.append(1),
            report=self.reports.append,
            defer=self.deferred.append,
        )
