"""The block device: what a request does to the disk (virtio 1.2, 5.2 "Block Device").

The rules of the disk are enforced here, whatever the backend would do: whole sectors, nothing
outside the capacity, no write to a read-only disk, buffers of the right direction.
"""

from __future__ import annotations

from pyvmm.errors import GuestError
from pyvmm.memory import GuestMemory
from pyvmm.storage.backend import BlockBackend
from pyvmm.virtio.block.config import BlockConfig, config_space
from pyvmm.virtio.block.request import (
    STATUS_SIZE,
    BadRequestError,
    Request,
    UnsupportedRequestError,
    UnusableChainError,
    data_views,
    status_of,
)
from pyvmm.virtio.device import Interrupt, VirtioDevice
from pyvmm.virtio.queue import Buffer, Chain
from pyvmm.virtio.spec import (
    BLOCK_ID_SIZE,
    SECTOR_SIZE,
    BlockFeature,
    BlockRequestType,
    BlockStatus,
    DeviceType,
    Feature,
)

_IN = int(BlockRequestType.IN)
_OUT = int(BlockRequestType.OUT)
_FLUSH = int(BlockRequestType.FLUSH)
_GET_ID = int(BlockRequestType.GET_ID)
_OK = int(BlockStatus.OK)

_MAX_DATA = 0xFFFF_FFFF - STATUS_SIZE
"""Bytes; ``len`` of a used element has 32 bits and counts the status byte too."""


class BlockDevice(VirtioDevice):
    """A disk of whole sectors over ``backend``.  The backend belongs to the caller."""

    device_type = DeviceType.BLOCK

    def __init__(self, config: BlockConfig, backend: BlockBackend) -> None:
        self._backend = backend
        self._read_only = config.read_only or backend.read_only
        self._id = config.serial.encode("ascii").ljust(BLOCK_ID_SIZE, b"\0")
        self._seg_max = config.seg_max
        self._flush_after_write = False
        features = Feature.VERSION_1 | Feature.INDIRECT_DESC
        features |= BlockFeature.SEG_MAX | BlockFeature.BLK_SIZE | BlockFeature.FLUSH
        if self._read_only:
            features |= BlockFeature.RO
        super().__init__(avail_features=features, queue_max_sizes=(config.queue_size,))

    @property
    def capacity_sectors(self) -> int:
        """The disk's size in sectors of 512 bytes."""
        return self._backend.size_bytes // SECTOR_SIZE

    def read_config(self, offset: int, length: int) -> bytes:
        """``length`` bytes of configuration space from ``offset``; zeros behind its end."""
        space = config_space(
            capacity_sectors=self.capacity_sectors,
            seg_max=self._seg_max,
            block_size=self._backend.block_size,
        )
        return space[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignored: no field is writable without VIRTIO_BLK_F_CONFIG_WCE."""

    def activate(self, memory: GuestMemory, interrupt: Interrupt) -> None:
        """See ``VirtioDevice.activate``."""
        super().activate(memory, interrupt)
        # 5.2.6.2 "Device Requirements: Device Operation": FLUSH was offered, so if the driver
        # declined it, a write is stable when it completes.
        self._flush_after_write = not self.acked_features & BlockFeature.FLUSH

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        """Serve one request; bytes written: data and status, or 0 if there is no status."""
        try:
            request = Request.parse(chain, memory)
        except UnusableChainError:
            return 0
        try:
            written = self._execute(request, memory)
        except (OSError, GuestError) as error:
            request.status[0] = status_of(error)
            return STATUS_SIZE
        request.status[0] = _OK
        return written + STATUS_SIZE

    def _execute(self, request: Request, memory: GuestMemory) -> int:
        """Do it; the bytes of data written into RAM.  OSError from the backend."""
        if request.type == _IN:
            return self._read(request, memory)
        if request.type == _OUT:
            return self._write(request, memory)
        if request.type == _FLUSH and self.acked_features & BlockFeature.FLUSH:
            self._backend.flush()
            return 0
        if request.type == _GET_ID:
            return self._write_id(request, memory)
        raise UnsupportedRequestError(f"request type {request.type}")

    def _read(self, request: Request, memory: GuestMemory) -> int:
        if request.readable:
            raise BadRequestError("read request with device-readable data")
        length = self._check_range(request.sector, request.writable)
        self._backend.readv(data_views(request.writable, memory), request.sector * SECTOR_SIZE)
        return length

    def _write(self, request: Request, memory: GuestMemory) -> int:
        if self._read_only:
            # 5.2.6.2: "A device MUST set the status byte to VIRTIO_BLK_S_IOERR for a write
            # request if the VIRTIO_BLK_F_RO feature if offered, and MUST NOT write any data."
            raise BadRequestError("write request to a read-only disk")
        if request.writable:
            raise BadRequestError("write request with device-writable data")
        self._check_range(request.sector, request.readable)
        self._backend.writev(data_views(request.readable, memory), request.sector * SECTOR_SIZE)
        if self._flush_after_write:
            self._backend.flush()
        return 0

    def _check_range(self, sector: int, buffers: list[Buffer]) -> int:
        """The bytes in ``buffers``; BadRequestError unless they are whole sectors of the disk."""
        length = 0
        for _, buffer_length in buffers:
            length += buffer_length
        if not length or length % SECTOR_SIZE or length > _MAX_DATA:
            raise BadRequestError(f"data of {length} bytes")
        if sector * SECTOR_SIZE + length > self._backend.size_bytes:
            raise BadRequestError(f"{length} bytes at sector {sector} of {self.capacity_sectors}")
        return length

    def _write_id(self, request: Request, memory: GuestMemory) -> int:
        """As much of the ID as there is room for, over as many buffers as it takes."""
        if request.readable:
            raise BadRequestError("ID request with device-readable data")
        rest = self._id
        for view in data_views(request.writable, memory):
            piece = rest[: len(view)]
            view[: len(piece)] = piece
            rest = rest[len(piece) :]
        return BLOCK_ID_SIZE - len(rest)
