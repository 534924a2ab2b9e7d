"""The contract between the driver half and the way to its device.

The order of calls is the reference's (the Rust crate ``virtio-driver`` of libblkio): ``features``,
``negotiate``, ``get_config``, ``setup_queues``, ``notify`` and waiting on ``completion_fd``,
``stop``, ``close``.  ``map_mem_region`` may be called after ``get_config``, as often as there is
memory to share.  ``VirtioBlkQueue.setup_queues`` does the steps of a block driver.

A device knows a byte of memory by the byte's address in this process.  So nothing has to be
translated, and every address in a ring is one that ``SharedMemory.address`` gives.

A subclass provides the abstract methods.  The checks that all have in common are made here, before
these are called.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from pyvmm.driver.errors import TransportError
from pyvmm.driver.memory import SharedMemory
from pyvmm.memory import PAGE_SIZE
from pyvmm.virtio.spec import Feature


class MappedRegion(NamedTuple):
    """``length`` bytes at ``address`` of this process, which are at ``offset`` of ``fd``.

    ``fd`` belongs to the caller of ``map_mem_region``, and is used only during that call.
    """

    address: int
    length: int
    fd: int
    offset: int

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.address + self.length


class QueueLayout(NamedTuple):
    """The addresses of the three areas of a virtqueue of ``size`` entries.

    Split (2.7): descriptor table, available ring, used ring.  Packed (2.8): descriptor ring, driver
    and device event suppression.
    """

    size: int
    descriptor: int
    driver: int
    device: int


class Transport(abc.ABC):
    """One device as a driver reaches it.  Not thread-safe; owned, and closed, by its maker."""

    def __init__(self) -> None:
        self.regions: tuple[MappedRegion, ...] = ()
        self.acked_features = 0
        self.queues: tuple[QueueLayout, ...] = ()
        self._queue_memory: list[tuple[SharedMemory, Callable[[], None]]] = []
        self._is_stopped = False
        self._is_closed = False

    # The device's abilities

    @property
    @abc.abstractmethod
    def features(self) -> int:
        """The virtio feature bits that the device offers."""

    @property
    @abc.abstractmethod
    def max_queues(self) -> int:
        """The most queues that ``setup_queues`` takes."""

    @property
    @abc.abstractmethod
    def max_queue_size(self) -> int:
        """The most entries a queue may have."""

    @property
    @abc.abstractmethod
    def max_mem_regions(self) -> int:
        """The most regions that can be mapped at a time; one of them holds the queues."""

    @abc.abstractmethod
    def get_config(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the device's configuration space from ``offset``.

        Bytes behind its end are zeros.  DriverError if the device does not tell.
        """

    # Setting it up

    def negotiate(self, features: int) -> None:
        """Accept ``features``, which are among ``Transport.features`` and include VERSION_1.

        TransportError if they cannot be accepted, or once queues are set up.
        """
        self._check_open()
        if self.queues or self._is_stopped:
            raise TransportError("features are negotiated once, before queues are set up")
        if unoffered := features & ~self.features:
            raise TransportError(f"feature bits {unoffered:#x} were not offered by the device")
        if not features & Feature.VERSION_1:
            raise TransportError("VIRTIO_F_VERSION_1 is needed; legacy devices are not driven")
        self._negotiate(features)
        self.acked_features = features

    def map_mem_region(self, address: int, length: int, fd: int, offset: int = 0) -> None:
        """Let the device use ``length`` bytes at ``address``: ``fd`` from ``offset``, mapped
        shared.

        They are whole pages.  ``fd`` may be closed afterwards.  TransportError if they are no whole
        pages, wrap, overlap another region or are one too many; DriverError if the device refuses.
        """
        self._check_open()
        region = MappedRegion(address, length, fd, offset)
        name = f"memory region {address:#x}+{length:#x}"
        if length <= 0 or (address | length | offset) % PAGE_SIZE or offset < 0:
            raise TransportError(f"{name} at offset {offset:#x} is not whole pages")
        if fd < 0:
            raise TransportError(f"{name} has no fd")
        if address < 0 or region.end > 1 << 64:
            raise TransportError(f"{name} does not end below 2^64")
        if any(address < other.end and other.address < region.end for other in self.regions):
            raise TransportError(f"{name} overlaps one that is mapped")
        if len(self.regions) >= self.max_mem_regions:
            raise TransportError(f"{name} is one too many: the limit is {self.max_mem_regions}")
        self._map_region(region)
        self.regions = (*self.regions, region)

    def unmap_mem_region(self, address: int, length: int) -> None:
        """Take away the whole of a region that ``map_mem_region`` has made known.

        No request in flight may use it.  TransportError if there is no such region, or if it holds
        queues: ``close`` unmaps those.
        """
        self._check_open()
        if any(address == memory.address for memory, _ in self._queue_memory):
            raise TransportError(f"memory region {address:#x}+{length:#x} holds queues")
        for region in self.regions:
            if (region.address, region.length) == (address, length):
                self._unmap_region(region)
                self.regions = tuple(one for one in self.regions if one is not region)
                return
        raise TransportError(f"memory region {address:#x}+{length:#x} is not mapped")

    def is_mapped(self, address: int, length: int) -> bool:
        """True if all ``length`` bytes at ``address`` lie in one region."""
        for start, size, _, _ in self.regions:
            if start <= address and address + length <= start + size:
                return True
        return False

    def alloc_queue_mem(self, length: int, release: Callable[[], None]) -> SharedMemory:
        """Return ``length`` bytes for queues, mapped.

        ``close`` frees them, after it has called ``release``, which must drop every view of them.
        """
        memory = SharedMemory(length)
        try:
            self.map_mem_region(memory.address, memory.length, memory.fd, memory.offset)
        except BaseException:
            memory.close()
            raise
        self._queue_memory.append((memory, release))
        return memory

    def setup_queues(self, queues: Sequence[QueueLayout]) -> None:
        """Start the device with ``queues``; queue i is the i-th of them.

        All lie in mapped memory and are as they must be before their first request.  TransportError
        if features were not negotiated, queues were set up already, or they are too many or too
        large; DriverError if the device refuses them.
        """
        self._check_open()
        if not self.acked_features or self.queues or self._is_stopped:
            raise TransportError("queues are set up once, after features are negotiated")
        if not 1 <= len(queues) <= self.max_queues:
            raise TransportError(f"{len(queues)} queues are not within 1 to {self.max_queues}")
        for queue in queues:
            if not 1 <= queue.size <= self.max_queue_size:
                raise TransportError(
                    f"queue size {queue.size} is not within 1 to {self.max_queue_size}"
                )
        self._setup_queues(queues)
        self.queues = tuple(queues)

    # While it runs

    @abc.abstractmethod
    def notify(self, queue_index: int) -> None:
        """Tell the device that queue ``queue_index`` has new requests.

        TransportError if there is no such queue, or it was stopped.
        """

    @abc.abstractmethod
    def submission_fd(self, queue_index: int) -> int:
        """Return an eventfd that belongs to the transport: writing to it is a ``notify``.

        TransportError if there is no such queue.
        """

    @abc.abstractmethod
    def completion_fd(self, queue_index: int) -> int:
        """Return an eventfd of the transport, readable when ``queue_index`` may have completions.

        The caller reads it before it collects them; reading does not block.  TransportError if
        there is no such queue.
        """

    @abc.abstractmethod
    def fileno(self) -> int:
        """Return an fd that is readable when the device has other news, or is gone: call
        ``check``."""

    @abc.abstractmethod
    def check(self) -> None:
        """Return if all is well.

        DriverError or VhostUserError, at every call, once the device is gone or says that it is
        broken.
        """

    # The end

    def stop(self) -> None:
        """Take the queues back from the device; idempotent.

        Requests that it has completed can still be collected; it touches the queues no more.  They
        cannot be started again: connect anew.  Never fails because the device is gone.
        """
        if self.queues and not self._is_stopped:
            self._is_stopped = True
            self._stop()

    def close(self) -> None:
        """Stop, unmap all memory and free everything that the transport owns; idempotent."""
        if self._is_closed:
            return
        self.stop()
        self._is_closed = True
        self._close()
        self.regions = ()
        for memory, release in self._queue_memory:
            release()
            memory.close()
        self._queue_memory.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # The subclass's part, after the checks above

    @abc.abstractmethod
    def _negotiate(self, features: int) -> None:
        """Tell the device the ``features`` accepted."""

    @abc.abstractmethod
    def _map_region(self, region: MappedRegion) -> None:
        """Give the device ``region``.  If it raises, the device does not have it."""

    @abc.abstractmethod
    def _unmap_region(self, region: MappedRegion) -> None:
        """Take ``region`` from the device; its ``fd`` may be closed by now."""

    @abc.abstractmethod
    def _setup_queues(self, queues: Sequence[QueueLayout]) -> None:
        """Give the device the queues and start it."""

    @abc.abstractmethod
    def _stop(self) -> None:
        """Take the queues back.  Errors because the device is gone are ignored."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Free fds and sockets and forget the regions; the queues are stopped.  Never fails."""

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransportError("the transport is closed")
