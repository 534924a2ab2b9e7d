"""One block request, parsed from a descriptor chain (5.2.6 "Device Operation").

Nothing is assumed about framing (2.7.4 "Message Framing"): the header is the first 16 readable
bytes, the status the last writable byte, wherever descriptors begin and end.
"""

from __future__ import annotations

import struct

from pyvmm.errors import GuestError, GuestMemoryError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.ring.queue import Buffer, Chain
from pyvmm.virtio.spec import BlockStatus

# struct virtio_blk_req { le32 type; le32 reserved; le64 sector; u8 data[]; u8 status; }
HEADER = struct.Struct("@IIQ")
HEADER_SIZE = HEADER.size
STATUS_SIZE = 1


class UnusableChainError(GuestError):
    """The chain has no complete header or no place for a status: it cannot be answered."""


class UnsupportedRequestError(GuestError):
    """The request's type is unknown or was not negotiated."""


class BadRequestError(GuestError):
    """The request is understood and wrong: length, range, direction, or a read-only disk."""


def status_of(error: OSError | GuestError) -> BlockStatus:
    """Return the status byte that tells the driver about ``error``."""
    if isinstance(error, UnsupportedRequestError):
        return BlockStatus.UNSUPP
    return BlockStatus.IOERR


class Request:
    """A request as the driver made it; ``type`` and the buffers are not yet judged.

    ``sector`` is in units of 512 bytes.  ``readable`` holds the data behind the header,
    ``writable`` the room in front of the status byte; ``status`` is a view of that byte.
    """

    __slots__ = ("readable", "sector", "status", "type", "writable")

    def __init__(
        self,
        request_type: int,
        sector: int,
        readable: list[Buffer],
        writable: list[Buffer],
        status: memoryview,
    ) -> None:
        self.type = request_type
        self.sector = sector
        self.readable = readable
        self.writable = writable
        self.status = status

    @classmethod
    def parse(cls, chain: Chain, memory: GuestMemory) -> Request:
        """Take ``chain`` apart; UnusableChainError if it has no header or status in RAM.

        The header is copied once; nothing is written.
        """
        readable, writable = chain.readable, chain.writable
        try:
            if readable and readable[0][1] == HEADER_SIZE:  # as every driver does it
                header = HEADER.unpack_from(memory.view(readable[0][0], HEADER_SIZE))
                readable = readable[1:]
            else:
                header, readable = _gather_header(readable, memory)
            status, writable = _split_status(writable, memory)
        except GuestMemoryError as error:
            raise UnusableChainError(str(error)) from error
        request_type, _, sector = header
        return cls(request_type, sector, readable, writable, status)


def data_views(buffers: list[Buffer], memory: GuestMemory) -> list[memoryview]:
    """Return views of RAM for ``buffers``; GuestMemoryError if any of it is not RAM."""
    return [memory.view(gpa, length) for gpa, length in buffers]


def _gather_header(
    buffers: list[Buffer], memory: GuestMemory
) -> tuple[tuple[int, int, int], list[Buffer]]:
    """Return the header in the first 16 bytes of ``buffers``, and the buffers behind them."""
    header = bytearray()
    for index, (gpa, length) in enumerate(buffers):
        taken = min(length, HEADER_SIZE - len(header))
        header += memory.read(gpa, taken)
        if len(header) == HEADER_SIZE:
            rest = [(gpa + taken, length - taken)] if length > taken else []
            return HEADER.unpack(header), rest + buffers[index + 1 :]
    raise UnusableChainError(f"the header has {len(header)} bytes of {HEADER_SIZE}")


def _split_status(buffers: list[Buffer], memory: GuestMemory) -> tuple[memoryview, list[Buffer]]:
    """Return a view of the last byte, and the buffers in front of it."""
    if not buffers:
        raise UnusableChainError("no room for a status")
    gpa, length = buffers[-1]
    front = length - STATUS_SIZE
    rest = buffers[:-1]
    if front:
        rest.append((gpa, front))
    return memory.view(gpa + front, STATUS_SIZE), rest
