"""A virtio-blk device behind /dev/vhost-vdpa-N, by the ioctls of <linux/vhost.h>.

Their order is the one in which QEMU calls them (its hw/virtio/vhost-vdpa.c).

The kernel is the device's end of the transport.  IOTLB messages, written to the device file, tell
it of memory, and ioctls of everything else.  No machine on which this was written has such a
device.  The tests (``tests/driver/test_vhost_vdpa.py``) run against a stand-in that keeps the rules
of ``drivers/vhost/vdpa.c`` and serves the queues with pyvmm's own block device.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sys
from collections.abc import Sequence

from pyvmm.driver import vhost_abi as abi
from pyvmm.driver.errors import DeviceBrokenError, TransportError
from pyvmm.driver.eventfds import QueueEventFds
from pyvmm.driver.transport import MappedRegion, QueueLayout, Transport
from pyvmm.kvm.abi import Ioctl, Structure
from pyvmm.startup.types import name_of
from pyvmm.virtio.ring.rings import first_base
from pyvmm.virtio.spec import DeviceType, Status

_ACCESS_PLATFORM = 1 << abi.VIRTIO_F_ACCESS_PLATFORM
_IOTLB_MSG_V2 = 1 << abi.VHOST_BACKEND_F_IOTLB_MSG_V2

_Number = ctypes.c_uint8 | ctypes.c_uint16 | ctypes.c_uint32 | ctypes.c_uint64 | ctypes.c_int32


class VhostVdpaTransport(Transport):
    """The device file ``path``, opened; every failure is a TransportError that names it.

    Memory is pinned while it is mapped, and counts for RLIMIT_MEMLOCK.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self._status = Status(0)
        self._is_fresh = True
        self._events = QueueEventFds()
        self._config_call = -1
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._error(f"cannot be opened: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self._close()
            raise

    def _open(self) -> None:
        """Open the file and learn the features that the device offers.

        3.1.1 "Driver Requirements: Device Initialization", steps 1 to 4 without the acceptance.
        """
        self._ioctl(abi.VHOST_SET_OWNER)
        device_id = self._get(abi.VHOST_VDPA_GET_DEVICE_ID, ctypes.c_uint32())
        if device_id != DeviceType.BLOCK:
            raise self._error(f"virtio device {device_id}, not a block device ({DeviceType.BLOCK})")
        backend_features = self._get(abi.VHOST_GET_BACKEND_FEATURES, ctypes.c_uint64())
        if not backend_features & _IOTLB_MSG_V2:
            raise self._error("VHOST_GET_BACKEND_FEATURES: no IOTLB messages of version 2")
        self._ioctl(abi.VHOST_SET_BACKEND_FEATURES, ctypes.c_uint64(_IOTLB_MSG_V2))
        self._reset()
        self._features = self._get(abi.VHOST_GET_FEATURES, ctypes.c_uint64())
        self._range = abi.vhost_vdpa_iova_range()
        self._ioctl(abi.VHOST_VDPA_GET_IOVA_RANGE, self._range)
        self._max_queues = self._get(abi.VHOST_VDPA_GET_VQS_COUNT, ctypes.c_uint32())
        self._max_queue_size = self._get(abi.VHOST_VDPA_GET_VRING_NUM, ctypes.c_uint16())
        self._config_size = self._get(abi.VHOST_VDPA_GET_CONFIG_SIZE, ctypes.c_uint32())
        self._config_call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ioctl(abi.VHOST_VDPA_SET_CONFIG_CALL, ctypes.c_int32(self._config_call))

    # The device's abilities

    @property
    def features(self) -> int:
        """See ``Transport.features``; without ACCESS_PLATFORM, which only this file deals with."""
        return self._features & ~_ACCESS_PLATFORM

    @property
    def max_queues(self) -> int:
        """See ``Transport.max_queues``."""
        return self._max_queues

    @property
    def max_queue_size(self) -> int:
        """See ``Transport.max_queue_size``."""
        return self._max_queue_size

    @property
    def max_mem_regions(self) -> int:
        """See ``Transport.max_mem_regions``: the kernel sets no limit."""
        return sys.maxsize

    def get_config(self, offset: int, length: int) -> bytes:
        """See ``Transport.get_config``."""
        self._check_open()
        there = max(0, min(length, self._config_size - offset))
        if not there:
            return bytes(length)
        header = abi.vhost_vdpa_config(off=offset, len=there)
        buffer = bytearray(header) + bytes(there)
        self._ioctl(abi.VHOST_VDPA_GET_CONFIG, buffer)
        return bytes(buffer[ctypes.sizeof(header) :]).ljust(length, b"\0")

    # Setting it up

    def _negotiate(self, features: int) -> None:
        if not self._is_fresh:
            # Features can change after a reset only, and that may cost the device its mappings,
            # although the kernel still has them.
            self._reset()
            for region in self.regions:
                self._unmap_region(region)
                self._map_region(region)
        self._is_fresh = False
        # 6.1: a driver "SHOULD accept VIRTIO_F_ACCESS_PLATFORM if it is offered"; the devices in
        # the kernel refuse SET_FEATURES without it.
        wanted = features | self._features & _ACCESS_PLATFORM
        self._ioctl(abi.VHOST_SET_FEATURES, ctypes.c_uint64(wanted))
        self._add_status(Status.FEATURES_OK)

    def _map_region(self, region: MappedRegion) -> None:
        first, last = self._range.first, self._range.last
        if region.address < first or region.end - 1 > last:
            raise self._error(
                f"memory region {region.address:#x}+{region.length:#x} is outside what the "
                f"device can address, {first:#x} to {last:#x}"
            )
        self._send_iotlb(abi.VHOST_IOTLB_UPDATE, region)

    def _unmap_region(self, region: MappedRegion) -> None:
        self._send_iotlb(abi.VHOST_IOTLB_INVALIDATE, region)

    def _setup_queues(self, queues: Sequence[QueueLayout]) -> None:
        self._events.open(len(queues))
        try:
            for index, queue in enumerate(queues):
                self._setup_queue(index, queue)
            self._add_status(Status.DRIVER_OK)
        except BaseException:
            self._events.close()
            raise

    def _setup_queue(self, index: int, queue: QueueLayout) -> None:
        base = first_base(self.acked_features)
        kick, call = self._events.kicks[index], self._events.calls[index]
        state, file = abi.vhost_vring_state, abi.vhost_vring_file
        self._ioctl(abi.VHOST_SET_VRING_NUM, state(index=index, num=queue.size))
        self._ioctl(abi.VHOST_SET_VRING_BASE, state(index=index, num=base))
        self._ioctl(
            abi.VHOST_SET_VRING_ADDR,
            abi.vhost_vring_addr(
                index=index,
                desc_user_addr=queue.descriptor,
                avail_user_addr=queue.driver,
                used_user_addr=queue.device,
            ),
        )
        self._ioctl(abi.VHOST_SET_VRING_KICK, file(index=index, fd=kick))
        self._ioctl(abi.VHOST_SET_VRING_CALL, file(index=index, fd=call))
        self._ioctl(abi.VHOST_VDPA_SET_VRING_ENABLE, state(index=index, num=1))

    # While it runs

    def notify(self, queue_index: int) -> None:
        """See ``Transport.notify``."""
        self._events.notify(queue_index)

    def submission_fd(self, queue_index: int) -> int:
        """See ``Transport.submission_fd``."""
        return self._events.kick(queue_index)

    def completion_fd(self, queue_index: int) -> int:
        """See ``Transport.completion_fd``."""
        return self._events.call(queue_index)

    def fileno(self) -> int:
        """See ``Transport.fileno``: the eventfd of the configuration interrupt, because the
        device file itself cannot be waited on."""
        return self._config_call

    def check(self) -> None:
        """See ``Transport.check``: 2.1 "Device Status Field" has DEVICE_NEEDS_RESET."""
        self._check_open()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._config_call)
        try:
            status = self._get(abi.VHOST_VDPA_GET_STATUS, ctypes.c_uint8())
        except TransportError as error:
            raise DeviceBrokenError(str(error)) from error
        if status & Status.DEVICE_NEEDS_RESET:
            raise DeviceBrokenError(f"{self.path}: the device needs a reset (status {status:#x})")

    # The end

    def _stop(self) -> None:
        # 2.1.2: a device that is reset touches no queue any more.  No milder way is served by every
        # device: VHOST_VDPA_SUSPEND is optional.
        with contextlib.suppress(TransportError):
            self._set_status(Status(0))

    def _close(self) -> None:
        # Closing the file resets the device and forgets its memory.
        os.close(self._fd)
        self._events.close()
        if self._config_call >= 0:
            os.close(self._config_call)

    # Calls of the kernel

    def _reset(self) -> None:
        self._set_status(Status(0))
        self._add_status(Status.ACKNOWLEDGE)
        self._add_status(Status.DRIVER)

    def _add_status(self, bit: Status) -> None:
        self._set_status(self._status | bit)
        status = self._get(abi.VHOST_VDPA_GET_STATUS, ctypes.c_uint8())
        if not status & bit:
            name = name_of(Status, bit)
            raise self._error(f"the device does not take status {name} (it is {status:#x})")

    def _set_status(self, status: Status) -> None:
        self._ioctl(abi.VHOST_VDPA_SET_STATUS, ctypes.c_uint8(status))
        self._status = status

    def _send_iotlb(self, kind: int, region: MappedRegion) -> None:
        """Write one message; the device uses addresses of this process."""
        message = abi.vhost_msg_v2(type=abi.VHOST_IOTLB_MSG_V2)
        message.iotlb.iova = message.iotlb.uaddr = region.address
        message.iotlb.size = region.length
        message.iotlb.perm = abi.VHOST_ACCESS_RW
        message.iotlb.type = kind
        try:
            os.write(self._fd, message)
        except OSError as error:
            verb = "mapped" if kind == abi.VHOST_IOTLB_UPDATE else "unmapped"
            # The kernel says EFAULT for any reason.
            raise self._error(
                f"memory region {region.address:#x}+{region.length:#x} cannot be {verb}: "
                f"{error.strerror} (pinned memory counts for RLIMIT_MEMLOCK)"
            ) from error

    def _get(self, request: Ioctl, result: _Number) -> int:
        """Return the number that ``request`` stores in ``result``."""
        self._ioctl(request, result)
        return result.value

    def _ioctl(
        self, request: Ioctl, argument: _Number | Structure | bytearray | None = None
    ) -> None:
        try:
            if argument is None:
                fcntl.ioctl(self._fd, request)
            else:
                fcntl.ioctl(self._fd, request, argument)
        except OSError as error:
            raise self._error(
                f"{abi.IOCTL_NAMES[request]}: {error.strerror} [errno {error.errno}]"
            ) from error

    def _error(self, problem: str) -> TransportError:
        return TransportError(f"{self.path}: {problem}")
