"""A virtio device that answers what its driver says, in capitals."""

from __future__ import annotations

from pyvmm.errors import GuestMemoryError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.device import RingDevice
from pyvmm.virtio.ring.queue import Chain
from pyvmm.virtio.spec import Feature

DEVICE_TYPE = 63
"""Of our own: virtio 1.2, 5 "Device Types" ends at 42."""
QUEUE_SIZE = 16
MAX_BYTES = 4096
"""Of one chain no more is answered: a guest cannot make us keep its memory in ours."""


class EchoDevice(RingDevice):
    """One queue; a chain is a text for the device to read, then room for the answer."""

    device_type = DEVICE_TYPE

    def __init__(self) -> None:
        super().__init__(avail_features=Feature.VERSION_1, queue_max_sizes=(QUEUE_SIZE,))

    def read_config(self, offset: int, length: int) -> bytes:
        """See ``VirtioDevice.read_config``: there is nothing."""
        return bytes(length)

    def write_config(self, offset: int, data: bytes) -> None:
        """See ``VirtioDevice.write_config``: nothing can be written."""

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        """Answer ``chain``; return how many bytes were written."""
        written = 0
        try:
            said = bytearray()
            for gpa, length in chain.readable:
                said += memory.read(gpa, min(length, MAX_BYTES - len(said)))
            answer = bytes(said).upper()
            for gpa, length in chain.writable:
                piece = answer[written : written + length]
                memory.write(gpa, piece)
                written += len(piece)
        except GuestMemoryError:
            pass  # the driver gave an address that is none
        return written
