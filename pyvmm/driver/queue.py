"""``VirtioBlkQueue``: block requests in, completions out (virtio 1.2, 5.2 "Block Device").

It follows the Rust crate ``virtio-driver`` of libblkio, method by method.  Enqueueing never
notifies: queue as many requests as there are, then ask ``avail_notif_needed`` once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from pyvmm.driver.errors import DeviceBrokenError, QueueFullError, RequestError, TransportError
from pyvmm.driver.limits import BlockLimits
from pyvmm.driver.memory import address_of
from pyvmm.driver.packed import PackedDriverRing
from pyvmm.driver.request import MAX_TABLE_ENTRIES, Completion, RequestSlots, Segment, slot_bytes
from pyvmm.driver.rings import DriverRing, ring_areas
from pyvmm.driver.split import SplitDriverRing
from pyvmm.driver.transport import QueueLayout, Transport
from pyvmm.virtio.ring.chains import INDIRECT, WRITE
from pyvmm.virtio.spec import (
    BLOCK_ID_SIZE,
    MAX_QUEUE_SIZE,
    SECTOR_SIZE,
    WRITE_ZEROES_F_UNMAP,
    BlockFeature,
    BlockRequestType,
    Feature,
)

DRIVER_FEATURES = int(
    Feature.VERSION_1
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.RING_PACKED
    | BlockFeature.SIZE_MAX
    | BlockFeature.SEG_MAX
    | BlockFeature.RO
    | BlockFeature.BLK_SIZE
    | BlockFeature.FLUSH
    | BlockFeature.TOPOLOGY
    | BlockFeature.MQ
    | BlockFeature.DISCARD
    | BlockFeature.WRITE_ZEROES
)
"""The features that the driver accepts if the device offers them."""

MIN_QUEUE_SIZE = 3
"""A chain has no more descriptors than the queue has entries: header, data, status."""

# Plain integers: an IntFlag or IntEnum costs more than the rest of queueing a request.
_IN = int(BlockRequestType.IN)
_OUT = int(BlockRequestType.OUT)
_FLUSH = int(BlockRequestType.FLUSH)
_GET_ID = int(BlockRequestType.GET_ID)
_DISCARD = int(BlockRequestType.DISCARD)
_WRITE_ZEROES = int(BlockRequestType.WRITE_ZEROES)


class VirtioBlkQueue:
    """One queue of a disk; ``setup_queues`` makes the queues.

    Offsets are bytes on the disk, lengths are bytes, and both are multiples of 512.  Data lies in
    memory that ``Transport.map_mem_region`` made known, and belongs to the device until the request
    is completed.  Each request has a ``context``, any object, which comes back once: in a
    ``Completion`` or from ``abandon``.

    RequestError, and QueueFullError if there is no room now, leave nothing half-queued.  Once the
    device broke a rule, every method but ``abandon`` raises DeviceBrokenError.  Not thread-safe;
    different queues may be used by different threads.
    """

    def __init__(self, ring: DriverRing, slots: RequestSlots, limits: BlockLimits) -> None:
        self._ring = ring
        self._slots = slots
        self._limits = limits
        self._contexts: dict[int, Any] = {}
        self._completed: deque[Completion] = deque()
        self._ended = ""

    @classmethod
    def setup_queues(
        cls,
        transport: Transport,
        num_queues: int,
        queue_size: int,
        *,
        features: int = DRIVER_FEATURES,
    ) -> list[VirtioBlkQueue]:
        """Negotiate ``features``, as far as offered, and start the device with ``num_queues``
        queues.

        Each has ``queue_size`` entries (for split rings, a power of 2).  The queues' memory is the
        transport's, until that is closed.  TransportError if the device does not have so many or so
        large queues; DriverError if it refuses.
        """
        transport.negotiate(transport.features & features)
        acked = transport.acked_features
        packed = bool(acked & Feature.RING_PACKED)
        most = min(transport.max_queue_size, MAX_QUEUE_SIZE)
        if not MIN_QUEUE_SIZE <= queue_size <= most:
            raise TransportError(
                f"queue size {queue_size} is not within {MIN_QUEUE_SIZE} to {most}"
            )
        if not packed and queue_size & (queue_size - 1):
            raise TransportError(f"queue size {queue_size} is not a power of 2")
        limits = BlockLimits(transport, queue_size)
        if not 1 <= num_queues <= limits.max_queues:
            raise TransportError(f"{num_queues} queues; the device has {limits.max_queues}")

        entries = 0
        if acked & Feature.INDIRECT_DESC:
            entries = min(limits.max_segments + 2, MAX_TABLE_ENTRIES)
        areas = ring_areas(queue_size, packed=packed)
        end = areas.end + slot_bytes(entries) * queue_size
        queues: list[VirtioBlkQueue] = []

        def release() -> None:
            for queue in queues:
                queue._release()

        memory = transport.alloc_queue_mem(end * num_queues, release)
        kind = PackedDriverRing if packed else SplitDriverRing
        event_idx = bool(acked & Feature.EVENT_IDX)
        layouts = []
        for start in range(0, end * num_queues, end):
            address = memory.address + start
            view = memory.view[start : start + end]
            ring = kind(view, queue_size, event_idx=event_idx)
            slots = RequestSlots(
                view[areas.end :], address + areas.end, entries, packed=packed
            )
            view.release()
            queues.append(cls(ring, slots, limits))
            layouts.append(
                QueueLayout(
                    queue_size,
                    descriptor=address + areas.descriptor,
                    driver=address + areas.driver,
                    device=address + areas.device,
                )
            )
        transport.setup_queues(layouts)
        return queues

    # The disk

    @property
    def capacity_bytes(self) -> int:
        """The disk's size."""
        return self._limits.capacity_bytes

    @property
    def read_only(self) -> bool:
        """True if the disk cannot be written."""
        return self._limits.read_only

    def refresh_capacity(self) -> bool:
        """Ask the device how large the disk is now, for all its queues; True if that changed."""
        return self._limits.refresh_capacity()

    # Requests

    def read(self, offset: int, buffer: memoryview, context: Any) -> None:
        """Read from ``offset`` into ``buffer``, all of it."""
        self._transfer(_IN, offset, (_locate(buffer),), context)

    def readv(self, offset: int, buffers: Sequence[memoryview], context: Any) -> None:
        """Read from ``offset`` into ``buffers``, one after the other; each of any length."""
        self._transfer(_IN, offset, [_locate(buffer) for buffer in buffers], context)

    def read_raw(self, offset: int, address: int, length: int, context: Any) -> None:
        """Read ``length`` bytes from ``offset`` to ``address`` in this process."""
        self._transfer(_IN, offset, ((address, length),), context)

    def write(self, offset: int, buffer: memoryview, context: Any) -> None:
        """Write ``buffer`` at ``offset``."""
        self._transfer(_OUT, offset, (_locate(buffer),), context)

    def writev(self, offset: int, buffers: Sequence[memoryview], context: Any) -> None:
        """Write ``buffers``, one after the other, at ``offset``; each of any length."""
        self._transfer(_OUT, offset, [_locate(buffer) for buffer in buffers], context)

    def write_raw(self, offset: int, address: int, length: int, context: Any) -> None:
        """Write the ``length`` bytes at ``address`` in this process at ``offset``."""
        self._transfer(_OUT, offset, ((address, length),), context)

    def discard(self, offset: int, length: int, context: Any) -> None:
        """Declare the bytes unneeded; they may read as anything afterwards."""
        limits = self._limits
        limits.check_feature(BlockFeature.DISCARD)
        limits.check_range("discard", length, limits.max_discard_bytes)
        self._submit_range(_DISCARD, offset, length, 0, context)

    def write_zeroes(
        self, offset: int, length: int, context: Any, *, unmap: bool = False
    ) -> None:
        """Make the bytes zero; with ``unmap`` the disk may give their room up, else it keeps it."""
        limits = self._limits
        limits.check_feature(BlockFeature.WRITE_ZEROES)
        limits.check_range("write-zeroes", length, limits.max_write_zeroes_bytes)
        flags = WRITE_ZEROES_F_UNMAP if unmap else 0
        self._submit_range(_WRITE_ZEROES, offset, length, flags, context)

    def flush(self, context: Any) -> None:
        """Make every write stable that was completed before this call."""
        self._limits.check_feature(BlockFeature.FLUSH)
        self._submit(_FLUSH, 0, (), 0, context)

    def get_id(self, buffer: memoryview, context: Any) -> None:
        """Read the device ID string into ``buffer``, which has 20 bytes; NUL bytes fill it up.

        The reference has no such method; here it is a request like any other.
        """
        address, length = _locate(buffer)
        if length != BLOCK_ID_SIZE:
            raise RequestError(f"a device ID of {length} bytes; it has {BLOCK_ID_SIZE}")
        segments = self._limits.cut(((address, length),))
        self._limits.check_mapped(segments)
        self._submit(_GET_ID, 0, segments, WRITE, context)

    def _transfer(
        self, request_type: int, offset: int, buffers: Sequence[Segment], context: Any
    ) -> None:
        """Queue a read or a write of ``buffers``."""
        limits, length = self._limits, 0
        for _, buffer_length in buffers:
            if buffer_length < 0:
                raise RequestError(f"a buffer of {buffer_length} bytes")
            length += buffer_length
        sector = limits.sector(offset, length)
        if request_type == _OUT:
            limits.check_writable()
        if len(buffers) > 1 or length > limits.max_segment_bytes:
            buffers = limits.cut(buffers)
        limits.check_mapped(buffers)
        self._submit(request_type, sector, buffers, WRITE if request_type == _IN else 0, context)

    def _submit_range(
        self, request_type: int, offset: int, length: int, flags: int, context: Any
    ) -> None:
        """Queue a discard or write-zeroes request of one range."""
        sector = self._limits.sector(offset, length)
        self._limits.check_writable()
        self._check_room(3)
        head = self._ring.next_head
        data = self._slots.put_range(head, sector, length // SECTOR_SIZE, flags)
        # The header's sector "is unused and set to 0 for commands other than read or write"
        # (5.2.6 "Device Operation"); the range has its own.
        self._submit(request_type, 0, (data,), 0, context)

    def _submit(
        self, request_type: int, sector: int, segments: Sequence[Segment], flag: int, context: Any
    ) -> None:
        """Queue a request that has been checked, if there is room."""
        descriptors = len(segments) + 2
        self._check_room(descriptors)
        ring, slots = self._ring, self._slots
        head = ring.next_head
        if descriptors <= slots.table_entries:
            table, length = slots.fill_table(head, request_type, sector, segments, flag)
            ring.push_one(table, length, INDIRECT)
        else:
            ring.push(slots.fill_chain(head, request_type, sector, segments, flag))
        self._contexts[head] = context

    def _check_room(self, descriptors: int) -> None:
        """Raise QueueFullError unless a request of so many descriptors can be queued now."""
        if self._ended:
            raise DeviceBrokenError(self._ended)
        needed = 1 if descriptors <= self._slots.table_entries else descriptors
        if needed > self._ring.free:
            raise QueueFullError(
                f"the queue has {self._ring.free} free descriptors, the request needs {needed}"
            )

    # Notifications and completions

    def avail_notif_needed(self) -> bool:
        """True if the device must be notified (``Transport.notify``) of requests queued since the
        last call."""
        self._check_alive()
        return self._ring.notification_needed()

    def set_used_notif_enabled(self, enabled: bool) -> None:
        """Have the device raise ``completion_fd`` for completions, as at first, or not.

        After enabling it, and before waiting, look at ``completions`` once more.
        """
        self._check_alive()
        self._ring.set_interrupts(enabled)

    def completions(self) -> Iterator[Completion]:
        """Yield the completions so far, in the device's order; never waits.

        Iterate to the end before waiting for ``completion_fd``: completions left over do not raise
        it again.
        """
        completed = self._completed
        while completed or self._collect():
            yield completed.popleft()

    def _collect(self) -> bool:
        """Take the chains that the device has used; True if there were any."""
        self._check_alive()
        try:
            heads = self._ring.take_used()
        except DeviceBrokenError as error:
            self._ended = str(error)
            raise
        contexts, ret = self._contexts, self._slots.ret
        self._completed.extend([Completion(contexts.pop(head), ret(head)) for head in heads])
        return bool(heads)

    @property
    def in_flight(self) -> int:
        """The number of requests queued and not yet collected."""
        return len(self._contexts)

    def abandon(self) -> list[Any]:
        """Give up: return the contexts of all requests in flight, oldest first.

        Their outcome is unknown.  This is for a device that is broken, gone or stopped; the queue
        takes no more requests.  Collect ``completions`` first, if the device was not broken.
        """
        self._ended = self._ended or "the queue was abandoned"
        contexts = list(self._contexts.values())
        self._contexts.clear()
        return contexts

    def _check_alive(self) -> None:
        if self._ended:
            raise DeviceBrokenError(self._ended)

    def _release(self) -> None:
        """The transport is closed: drop every view of its memory."""
        self._ended = self._ended or "the transport was closed"
        self._ring.release()
        self._slots.release()


def _locate(buffer: memoryview) -> Segment:
    """Return the place of ``buffer``; RequestError unless it is writable, contiguous memory."""
    try:
        length = buffer.nbytes
    except AttributeError:
        raise RequestError(
            f"the buffer is of type {type(buffer).__name__}; it is to be a view of memory that"
            " was mapped, like SharedMemory.view[:512]"
        ) from None
    if not length:
        return 0, 0
    try:
        return address_of(buffer), length
    except TypeError as error:
        raise RequestError(f"the buffer has no address: {error}") from error
