"""The entropy device (virtio 1.2, 5.4 "Entropy Device"): the host's random bytes."""

from __future__ import annotations

import os

from pyvmm.errors import GuestMemoryError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.device import RingDevice
from pyvmm.virtio.ring.queue import Chain
from pyvmm.virtio.spec import DeviceType, Feature

QUEUE_SIZE = 16
MAX_CHAIN_BYTES = 4096
"""Bytes a chain gets at most: 5.4.6.1 asks for "one or more", and the driver asks again."""


class EntropyDevice(RingDevice):
    """Fills buffers with random bytes; it has no features and no configuration space."""

    device_type = DeviceType.ENTROPY

    def __init__(self) -> None:
        features = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX
        super().__init__(avail_features=features, queue_max_sizes=(QUEUE_SIZE,))

    def read_config(self, offset: int, length: int) -> bytes:
        """See ``VirtioDevice.read_config``: all of it is 0."""
        return bytes(length)

    def write_config(self, offset: int, data: bytes) -> None:
        """See ``VirtioDevice.write_config``: nothing can be written."""

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        """Fill ``chain``; return the number of bytes."""
        written = 0
        for gpa, length in chain.writable:
            piece = os.urandom(min(length, MAX_CHAIN_BYTES - written))
            try:
                memory.write(gpa, piece)
            except GuestMemoryError:
                break  # the driver gave an address that is none, and gets nothing there
            written += len(piece)
        return written
