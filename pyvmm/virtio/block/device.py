"""The block device: the effect of a request on the disk (virtio 1.2, 5.2 "Block Device").

The rules of the disk are enforced here, whatever the backend would do: whole sectors, nothing
outside the capacity, no write to a read-only disk, buffers of the right direction.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable

from pyvmm.errors import GuestError
from pyvmm.memory import GuestMemory
from pyvmm.storage.backend import BlockBackend
from pyvmm.virtio.block.config import (
    WRITEBACK_OFFSET,
    BlockConfig,
    config_space,
    offered_features,
)
from pyvmm.virtio.block.fast.make import make_fast_ring
from pyvmm.virtio.block.fast.path import FastPath
from pyvmm.virtio.block.fast.ring import FastRing
from pyvmm.virtio.block.ranges import discard, write_zeroes
from pyvmm.virtio.block.request import (
    HEADER_SIZE,
    STATUS_SIZE,
    BadRequestError,
    Request,
    UnsupportedRequestError,
    UnusableChainError,
    data_views,
    status_of,
)
from pyvmm.virtio.device import (
    CALL_WORK,
    MAX_CHAIN_BYTES,
    Interrupt,
    RingDevice,
    for_one_pass,
)
from pyvmm.virtio.rate_limit import RateLimit, RateLimiter
from pyvmm.virtio.ring.queue import Buffer, Chain, Queue, Ring
from pyvmm.virtio.spec import (
    BLOCK_ID_SIZE,
    SECTOR_SIZE,
    BlockFeature,
    BlockRequestType,
    BlockStatus,
    DeviceType,
)

# Plain integers: an IntFlag operation costs more than the rest of a request's dispatch.
_IN = int(BlockRequestType.IN)
_OUT = int(BlockRequestType.OUT)
_FLUSH = int(BlockRequestType.FLUSH)
_GET_ID = int(BlockRequestType.GET_ID)
_DISCARD = int(BlockRequestType.DISCARD)
_WRITE_ZEROES = int(BlockRequestType.WRITE_ZEROES)
_OK = int(BlockStatus.OK)

_MAX_SECTORS = (1 << 64) // SECTOR_SIZE - 1
_MAX_DATA = MAX_CHAIN_BYTES - 4096
"""Bytes of one request.  No driver that keeps to SEG_MAX and SIZE_MAX reaches it, whatever the
queue size: 254 segments of 1 MiB, or 1022 of 256 KiB, are less."""
_EXTRA_CALL_WORK = 16 << 10
"""The work of each of a backend's ``extra_calls``, besides its bytes."""


class BlockDevice(RingDevice):
    """A disk of whole sectors over ``backend``, which belongs to the caller.

    It stays ``disk``, whatever is put before it.  The rate limiter reads ``clock``, in seconds.
    Several devices of one disk share ``limiter``; without it the device has its own.
    """

    device_type = DeviceType.BLOCK

    def __init__(
        self,
        config: BlockConfig,
        backend: BlockBackend,
        *,
        clock: Callable[[], float] = time.monotonic,
        limiter: RateLimiter | None = None,
    ) -> None:
        self._config = config
        self.disk = self._backend = backend
        self._clock = clock
        self._read_only = config.read_only or backend.read_only
        self._id = config.serial.encode("ascii").ljust(BLOCK_ID_SIZE, b"\0")
        self._writeback = config.writeback
        self._extra_work = 0  # of the requests served since it was last asked for
        self._calls_counted = backend.extra_calls
        self._limiter = limiter
        # Chains that a rate limit keeps waiting, by queue index: taken, not yet served.
        self._held: dict[int, Chain] = {}
        # By queue index, each made in the first pass over a ring.
        self._fast_paths: dict[int, FastPath] = {}
        super().__init__(
            avail_features=offered_features(config, backend),
            queue_max_sizes=(config.queue_size,) * config.queues,
        )
        if limiter is None:
            self.set_rate_limit(config.rate_limit)

    def put_before_backend(self, wrap: Callable[[BlockBackend], BlockBackend]) -> None:
        """Send every request to ``wrap(backend)`` from now on; before the driver starts.

        It has the size, block size and abilities of ``backend``.  RuntimeError afterwards.
        """
        if self._memory is not None:
            raise RuntimeError("the driver has started this disk already")
        self._backend = wrap(self._backend)
        self._calls_counted = self._backend.extra_calls

    # The disk as the driver sees it

    @property
    def capacity_sectors(self) -> int:
        """The disk's size in sectors of 512 bytes."""
        return self._backend.size_bytes // SECTOR_SIZE

    def refresh(self) -> bool:
        """See ``VirtioDevice.refresh``: the backend may have grown.

        It only looks at a size, so this may be called while a pass is under way.  OSError from it
        leaves the size as it was.
        """
        before = self._backend.size_bytes
        return self._backend.refresh_size() != before

    def hurry(self, until_s: float) -> None:
        """See ``VirtioDevice.hurry``: whoever serves the backend may be slow."""
        self._backend.hurry(until_s)

    def read_config(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of configuration space from ``offset``; zeros behind its end."""
        space = config_space(
            self._config, self._backend, self.avail_features,
            writeback=self._writeback, ring_size=self._advised_ring_size,
        )  # fmt: skip
        return space[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the driver's choice of the cache mode, 0 or 1 in ``writeback``, if it negotiated
        CONFIG_WCE.  All other bytes are not writable and ignored."""
        place = WRITEBACK_OFFSET - offset
        if not (self.acked_features & BlockFeature.CONFIG_WCE and 0 <= place < len(data)):
            return
        if data[place] not in (0, 1):
            return
        writeback = bool(data[place])
        if self._writeback and not writeback:
            # The driver will send no more flushes, so what it has written becomes stable now.
            # A failure is not lost: the backend fails every durable write after it.
            with contextlib.suppress(OSError):
                self._backend.flush()
        self._writeback = writeback

    def set_acked_features(self, features: int) -> None:
        """See ``VirtioDevice.set_acked_features``."""
        super().set_acked_features(features)
        # 5.2.6.2 "Device Requirements: Device Operation": FLUSH was offered, so if the driver
        # declined it, a write is stable when it completes; and 5.2.5.2: "If
        # VIRTIO_BLK_F_CONFIG_WCE is negotiated but VIRTIO_BLK_F_FLUSH is not, the device MUST
        # initialize writeback to 0".
        self._writeback = self._config.writeback and bool(features & BlockFeature.FLUSH)

    def reset(self) -> None:
        """See ``VirtioDevice.reset``.  The rate limiter goes on: a driver that resets the device
        does not get a fresh burst."""
        super().reset()
        for index in list(self._held):
            self._drop_held(index)
        self._fast_paths.clear()
        self._writeback = self._config.writeback

    def stop_queue(self, index: int) -> int:
        """See ``VirtioDevice.stop_queue``.  The queue's place in the line is free again, or it
        would hold up the disk's other queues for ever."""
        self._drop_held(index)
        self._fast_paths.pop(index, None)
        return super().stop_queue(index)

    def save(self) -> dict[str, object]:
        """See ``VirtioDevice.save``; the disk's bytes are not in it, only its size."""
        return {
            "common": super().save(),
            "capacity_sectors": self.capacity_sectors,
            "writeback": self._writeback,
            "rate_limit": self._limiter.save() if self._limiter else None,
        }

    def restore(self, data: object, memory: GuestMemory, interrupt: Interrupt) -> None:
        """See ``VirtioDevice.restore``; StateError too for a disk of another size."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields(self.name, data)
        common, limit = fields.take("common"), fields.take("rate_limit")
        capacity_sectors = fields.integer("capacity_sectors", 0, _MAX_SECTORS)
        writeback = fields.boolean("writeback")
        fields.end()
        if capacity_sectors != self.capacity_sectors:
            raise fields.error(
                "capacity_sectors", f"is {capacity_sectors}, the disk has {self.capacity_sectors}"
            )
        limiter = RateLimiter(RateLimit(), clock=self._clock)
        if limit is not None:
            limiter.restore(limit)
        super().restore(common, memory, interrupt)
        self._writeback = writeback
        if limit is None:
            self._limiter = None
        elif self._limiter is None:
            self._limiter = limiter
        else:  # several devices may share it
            self._limiter.restore(limit)

    # The rate limit

    def set_rate_limit(self, limit: RateLimit) -> None:
        """Limit the disk to ``limit`` from the next request on; from any thread, at any time."""
        if not limit:
            self._limiter = None
        elif self._limiter is None:
            self._limiter = RateLimiter(limit, clock=self._clock)
        else:
            self._limiter.change(limit)

    def _drop_held(self, index: int) -> None:
        """Forget the chain of queue ``index`` that waits for its turn, and the turn."""
        self._held.pop(index, None)
        if self._limiter is not None:
            self._limiter.leave((self, index))

    # Two ways to serve a queue: the fast path, and with a rate limit that of every RingDevice

    def _make_ring(self, queue: Queue, memory: GuestMemory) -> FastRing:
        """See ``VirtioDevice._make_ring``; this ring serves both ways."""
        return make_fast_ring(queue, memory, self._acked_features, self.queues)

    def process_queue(self, index: int) -> float | None:
        """See ``VirtioDevice.process_queue``: by the fast path, unless there is a rate limit."""
        if self._limiter is not None or self._held:
            return super().process_queue(index)
        fast = self._fast_paths.get(index)
        if fast is None:
            fast = self._make_fast_path(index)
            if fast is None:
                return None
        return fast.process(durable=not self._writeback)

    def _make_fast_path(self, index: int) -> FastPath | None:
        """Return the fast path of queue ``index``, None if the queue is not served.

        It is used until the queue is stopped."""
        memory, interrupt = self._memory, self._interrupt
        if memory is None or interrupt is None or not self.queues[index].ready:
            return None
        ring = self._rings[index]
        if not isinstance(ring, FastRing):
            return None
        fast = self._fast_paths[index] = FastPath(
            ring,
            memory,
            self._backend,
            may_write=not self._read_only,
            may_flush=bool(self.acked_features & BlockFeature.FLUSH),
            serve=lambda chain: self._serve(chain, memory),
            extra_work=self._take_extra_work,
            index=index,
            notify=interrupt.notify_used,
        )
        return fast

    def _serve_ring(self, index: int, ring: Ring, memory: GuestMemory) -> float:
        """See ``RingDevice._serve_ring``.  The first chain that has to wait for the rate limit is
        held back, and comes first in a later pass."""
        limiter = self._limiter
        held = self._held.pop(index, None)
        waiting = ring.take_chains()
        if held is not None:
            waiting = itertools.chain((held,), waiting)
        for chain in for_one_pass(waiting, self._take_extra_work):
            delay_s = limiter.admit(self._cost(chain), (self, index)) if limiter else 0.0
            if delay_s:
                self._held[index] = chain
                return delay_s
            ring.push(chain, self._serve(chain, memory))
        return 0.0

    def _cost(self, chain: Chain) -> int:
        """Return the bytes that ``chain`` can move: its buffers without header and status.

        Never more than the disk has, or one absurd length would stop the disk for hours."""
        length = sum(buffer_length for _, buffer_length in chain.readable)
        length += sum(buffer_length for _, buffer_length in chain.writable)
        return min(max(0, length - HEADER_SIZE - STATUS_SIZE), self._backend.size_bytes)

    # Requests

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        """Serve one request; return the bytes written: data and status, or 0 without a status."""
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
        """Do what ``request`` asks; return the bytes of data written into RAM.  OSError from the
        backend."""
        if request.type == _IN:
            return self._read(request, memory)
        if request.type == _OUT:
            return self._write(request, memory)
        if request.type == _FLUSH and self.acked_features & BlockFeature.FLUSH:
            self._backend.flush()
            self._extra_work += CALL_WORK
            return 0
        if request.type == _GET_ID:
            return self._write_id(request, memory)
        if request.type == _DISCARD and self.acked_features & BlockFeature.DISCARD:
            discard(request, memory, self._backend, self._add_extra_work)
            return 0
        if request.type == _WRITE_ZEROES and self.acked_features & BlockFeature.WRITE_ZEROES:
            write_zeroes(request, memory, self._backend, self._add_extra_work)
            if not self._writeback:
                self._backend.flush()  # what a durable write is to the data it writes
            return 0
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
        self._backend.writev(
            data_views(request.readable, memory),
            request.sector * SECTOR_SIZE,
            durable=not self._writeback,
        )
        return 0

    def _check_range(self, sector: int, buffers: list[Buffer]) -> int:
        """Return the bytes in ``buffers``; BadRequestError unless they are whole sectors of the
        disk."""
        length = 0
        for _, buffer_length in buffers:
            length += buffer_length
        if not length or length % SECTOR_SIZE or length > _MAX_DATA:
            raise BadRequestError(f"data of {length} bytes")
        if sector * SECTOR_SIZE + length > self._backend.size_bytes:
            raise BadRequestError(f"{length} bytes at sector {sector} of {self.capacity_sectors}")
        return length

    def _write_id(self, request: Request, memory: GuestMemory) -> int:
        """Write as much of the ID as there is room for; return its bytes."""
        if request.readable:
            raise BadRequestError("ID request with device-readable data")
        rest = self._id
        for view in data_views(request.writable, memory):
            piece = rest[: len(view)]
            view[: len(piece)] = piece
            rest = rest[len(piece) :]
        return BLOCK_ID_SIZE - len(rest)

    def _take_extra_work(self) -> int:
        """See ``RingDevice._take_extra_work``: ranges, flushes, bytes that do not move, and the
        calls that a transfer falls into."""
        work, self._extra_work = self._extra_work, 0
        calls = self._backend.extra_calls
        work += (calls - self._calls_counted) * _EXTRA_CALL_WORK
        self._calls_counted = calls
        return work

    def _add_extra_work(self, work: int) -> None:
        self._extra_work += work
