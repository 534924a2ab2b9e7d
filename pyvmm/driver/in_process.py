"""The transport to a device of our own in this process: two halves of one virtio-mmio device.

Nothing runs by itself here.  ``notify`` is a write to QueueNotify, and has the device serve the
queue before it returns.  ``serve`` does the rest on the caller's thread: the requests of submission
eventfds, and work that a notify has left.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence

from pyvmm.driver.errors import DeviceBrokenError, TransportError
from pyvmm.driver.eventfds import QueueEventFds
from pyvmm.driver.transport import MappedRegion, QueueLayout, Transport
from pyvmm.memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import InterruptBit, Register, Status

_MAX_MEM_REGIONS = 32
_WORD = 0xFFFF_FFFF
_CONFIG_BYTES = PAGE_SIZE - Register.CONFIG


class InProcessTransport(Transport):
    """``device``, which belongs to the caller, behind the registers of virtio-mmio.

    It gets mappings of its own of the memory that it is given, at the same addresses as its RAM.
    virtio-mmio has one interrupt line: it raises the completion eventfds of all queues.
    """

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__()
        self._memory = GuestMemory.empty()
        self._mappings: dict[int, tuple[Region, mmap.mmap]] = {}
        self._reports: list[str] = []
        self._waiting: set[int] = set()  # queues in which a pass has left work
        self._events = QueueEventFds()
        self._event_fd = _eventfd()
        self._mmio = MmioTransport(
            device,
            self._memory,
            self._interrupted,
            report=self._reports.append,
            defer=self._waiting.add,
        )

    # The device's abilities

    @property
    def features(self) -> int:
        """See ``Transport.features``."""
        features = 0
        for word in (0, 1):
            self._write(Register.DEVICE_FEATURES_SEL, word)
            features |= self._read(Register.DEVICE_FEATURES) << 32 * word
        return features

    @property
    def max_queues(self) -> int:
        """See ``Transport.max_queues``: those with a QueueNumMax that is not 0."""
        count = 0
        while self._queue_num_max(count):
            count += 1
        return count

    @property
    def max_queue_size(self) -> int:
        """See ``Transport.max_queue_size``."""
        return self._queue_num_max(0)

    @property
    def max_mem_regions(self) -> int:
        """See ``Transport.max_mem_regions``."""
        return _MAX_MEM_REGIONS

    def get_config(self, offset: int, length: int) -> bytes:
        """See ``Transport.get_config``; read until the generation stays (2.5.1 "Driver
        Requirements: Device Configuration Space")."""
        if offset < 0 or length < 0 or offset + length > _CONFIG_BYTES:
            raise TransportError(
                f"{length} bytes at {offset} are not within {_CONFIG_BYTES} of configuration space"
            )
        start = Register.CONFIG + offset
        while True:
            generation = self._read(Register.CONFIG_GENERATION)
            data = bytes(self._mmio.read(at, 1) for at in range(start, start + length))
            if self._read(Register.CONFIG_GENERATION) == generation:
                return data

    # Set-up: 3.1.1 "Driver Requirements: Device Initialization"

    def _negotiate(self, features: int) -> None:
        self._write(Register.STATUS, 0)
        status = 0
        for step in (Status.ACKNOWLEDGE, Status.DRIVER):
            status |= step
            self._write(Register.STATUS, status)
        for word in (0, 1):
            self._write(Register.DRIVER_FEATURES_SEL, word)
            self._write(Register.DRIVER_FEATURES, features >> 32 * word & _WORD)
        self._write(Register.STATUS, status | Status.FEATURES_OK)
        if not self._read(Register.STATUS) & Status.FEATURES_OK:
            raise TransportError(f"features {features:#x} refused: {self._last_report}")

    def _map_region(self, region: MappedRegion) -> None:
        try:
            mapping = mmap.mmap(region.fd, region.length, offset=region.offset)
        except (OSError, ValueError, OverflowError) as error:
            raise TransportError(
                f"memory region {region.address:#x}+{region.length:#x} at offset "
                f"{region.offset:#x} of its fd cannot be mapped: {error}"
            ) from error
        self._mappings[region.address] = self._memory.add(region.address, mapping), mapping

    def _unmap_region(self, region: MappedRegion) -> None:
        ram, mapping = self._mappings.pop(region.address)
        self._memory.remove(ram)
        mapping.close()

    def _setup_queues(self, queues: Sequence[QueueLayout]) -> None:
        self._events.open(len(queues))
        for index, queue in enumerate(queues):
            self._write(Register.QUEUE_SEL, index)
            self._write(Register.QUEUE_NUM, queue.size)
            for register, address in (
                (Register.QUEUE_DESC_LOW, queue.descriptor),
                (Register.QUEUE_DRIVER_LOW, queue.driver),
                (Register.QUEUE_DEVICE_LOW, queue.device),
            ):
                self._write(register, address & _WORD)
                self._write(register + 4, address >> 32)
            self._write(Register.QUEUE_READY, 1)
        self._write(Register.STATUS, self._read(Register.STATUS) | Status.DRIVER_OK)
        self.check()

    # While it runs

    def notify(self, queue_index: int) -> None:
        """See ``Transport.notify``: the queue is served before this returns."""
        self._check_open()
        self._events.kick(queue_index)
        if self._is_stopped:
            raise TransportError(f"queue {queue_index} was stopped")
        self._write(Register.QUEUE_NOTIFY, queue_index)

    def serve(self) -> float | None:
        """Have the device make a pass over queues with a written submission eventfd or work left.

        Returns when to call again, as ``MmioTransport.service`` does: None after the next
        notification, 0.0 at once, else in so many seconds because of a rate limit.
        """
        self._check_open()
        delay_s: float | None = None
        for index, fd in enumerate(self._events.kicks):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
                self._waiting.add(index)
        for index in sorted(self._waiting):
            left_s = self._mmio.service(index)
            if left_s is None:
                self._waiting.discard(index)
            else:
                delay_s = left_s if delay_s is None else min(delay_s, left_s)
        return delay_s

    def submission_fd(self, queue_index: int) -> int:
        """See ``Transport.submission_fd``; ``serve`` looks at it."""
        self._check_open()
        return self._events.kick(queue_index)

    def completion_fd(self, queue_index: int) -> int:
        """See ``Transport.completion_fd``."""
        self._check_open()
        return self._events.call(queue_index)

    def fileno(self) -> int:
        """See ``Transport.fileno``: an eventfd, for configuration change notifications."""
        return self._event_fd

    def check(self) -> None:
        """See ``Transport.check``: DeviceBrokenError while DEVICE_NEEDS_RESET is set."""
        self._check_open()
        if self._read(Register.STATUS) & Status.DEVICE_NEEDS_RESET:
            raise DeviceBrokenError(self._last_report)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)

    def config_changed(self) -> None:
        """Tell the driver that the device's configuration space has new contents (a disk grew)."""
        self._mmio.config_changed()

    # The end

    def _stop(self) -> None:
        self._write(Register.STATUS, 0)

    def _close(self) -> None:
        self._mmio.close()
        for region in self.regions:
            self._unmap_region(region)
        self._memory.close()
        self._events.close()
        os.close(self._event_fd)

    # Registers

    def _read(self, register: int) -> int:
        self._check_open()
        return self._mmio.read(register, 4)

    def _write(self, register: int, value: int) -> None:
        self._check_open()
        self._mmio.write(register, 4, value)

    def _queue_num_max(self, index: int) -> int:
        self._write(Register.QUEUE_SEL, index)
        return self._read(Register.QUEUE_NUM_MAX)

    def _interrupted(self) -> None:
        """Pass on a pulse of the interrupt line, on the thread that had the device do something."""
        status = self._mmio.read(Register.INTERRUPT_STATUS, 4)
        self._mmio.write(Register.INTERRUPT_ACK, 4, status)
        if status & InterruptBit.USED_BUFFER:
            for fd in self._events.calls:
                os.eventfd_write(fd, 1)
        if status & InterruptBit.CONFIG_CHANGE:
            os.eventfd_write(self._event_fd, 1)

    @property
    def _last_report(self) -> str:
        return self._reports[-1] if self._reports else "the device does not say why"


def _eventfd() -> int:
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise TransportError(f"no eventfd: {error.strerror}") from error
