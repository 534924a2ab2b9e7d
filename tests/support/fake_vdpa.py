"""A stand-in for /dev/vhost-vdpa-N and the kernel behind it, which no machine here has.

It keeps the rules of the kernel's drivers/vhost/vdpa.c and vhost.c (who may call what, when, and
which errno there is otherwise), and serves the queues with a real BlockDevice, out of memory that
it knows from IOTLB messages alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from pyvmm.driver import vhost_abi as abi
from pyvmm.kvm.abi import Ioctl
from pyvmm.memory import GuestMemory, Region
from pyvmm.virtio.block import BlockDevice
from pyvmm.virtio.spec import Feature, Status

ACCESS_PLATFORM = 1 << abi.VIRTIO_F_ACCESS_PLATFORM


class FakeVdpa:
    """``refuse`` has the errno with which an ioctl fails, by name; ``calls`` are those there were,
    and the IOTLB messages: ``(name, argument as it came)``."""

    def __init__(self, path: Path, device: BlockDevice) -> None:
        path.touch()
        self.path = path
        self.device = device
        self.device_id = int(device.device_type)
        self.backend_features = 1 << abi.VHOST_BACKEND_F_IOTLB_MSG_V2
        self.iova_range = (0, (1 << 48) - 1)
        self.features_taken = True
        self.refuse: dict[str, int] = {}
        self.calls: list[tuple[str, bytes]] = []
        self.status = 0
        self.config_call = -1
        self.calls_of_queues: dict[int, int] = {}
        self.enabled: set[int] = set()
        self._kicks: dict[int, int] = {}
        self._owned = False
        self._acked = 0
        self._mapped: dict[tuple[int, int], bool] = {}
        self._memory = GuestMemory.empty()

    @property
    def names(self) -> list[str]:
        """What was called, without arguments."""
        return [name for name, _ in self.calls]

    @property
    def mappings(self) -> set[tuple[int, int]]:
        """``(iova, size)`` of what the kernel has mapped, whether the device still knows or not."""
        return set(self._mapped)

    # The system calls

    def is_mine(self, fd: int) -> bool:
        """Whether ``fd`` is the device file, open."""
        try:
            return Path(f"/proc/self/fd/{fd}").readlink() == self.path
        except OSError:
            return False

    def ioctl(self, request: int, argument: bytearray | ctypes.Structure | None) -> int:
        name = abi.IOCTL_NAMES[Ioctl(request)]
        given = b"" if argument is None else bytes(argument)
        if request >> 30 & 1:  # _IOW: what an _IOR finds there is not read
            self.calls.append((name, given))
        else:
            self.calls.append((name, b""))
        if name in self.refuse:
            raise _os_error(self.refuse[name])
        if name == "VHOST_SET_OWNER":
            if self._owned:
                raise _os_error(errno.EBUSY)
            self._owned = True
        elif name.startswith("VHOST_SET_VRING_") or name == "VHOST_VDPA_SET_VRING_ENABLE":
            self._set_vring(name, given)
        elif name.startswith(("VHOST_SET_", "VHOST_VDPA_SET_")):
            self._set(name, int.from_bytes(given, "little"))
        else:
            assert argument is not None
            answer = self._get(name, given)
            memoryview(argument).cast("B")[:] = answer
        return 0

    def write(self, data: bytes) -> int:
        """An IOTLB message: "ret = -EFAULT" whatever is wrong with it."""
        message = abi.vhost_msg_v2.from_buffer_copy(data)
        part = message.iotlb
        kind = {2: "UPDATE", 3: "INVALIDATE"}[part.type]
        self.calls.append((f"IOTLB {kind}", data))
        if not self._owned or message.type != abi.VHOST_IOTLB_MSG_V2 or not part.size:
            raise _os_error(errno.EINVAL)
        if kind == "INVALIDATE":
            self._mapped.pop((part.iova, part.size), None)
            for region in self._memory.regions:
                if (region.gpa, region.length) == (part.iova, part.size):
                    self._memory.remove(region)
        else:
            self._update(part)
        return len(data)

    def _update(self, part: abi.vhost_iotlb_msg) -> None:
        first, last = self.iova_range
        end = part.iova + part.size
        inside = first <= part.iova and end - 1 <= last
        taken = any(part.iova < b + n and b < end for b, n in self._mapped)
        if not inside or taken or part.perm != abi.VHOST_ACCESS_RW:
            raise _os_error(errno.EFAULT)
        self._mapped[part.iova, part.size] = True
        ram = memoryview((ctypes.c_char * part.size).from_address(part.uaddr)).cast("B")
        self._memory.add(part.iova, ram)

    # Numbers asked for and told

    def _get(self, name: str, given: bytes) -> bytes:
        space = self.device.read_config(0, 60)
        if name == "VHOST_VDPA_GET_CONFIG":
            offset, length = (int.from_bytes(given[i : i + 4], "little") for i in (0, 4))
            if not length or offset + length > len(space) or len(given) != 8 + length:
                raise _os_error(errno.EINVAL)
            return given[:8] + space[offset : offset + length]
        if name == "VHOST_VDPA_GET_IOVA_RANGE":
            return b"".join(end.to_bytes(8, "little") for end in self.iova_range)
        value = {
            "VHOST_GET_FEATURES": self.device.avail_features | ACCESS_PLATFORM,
            "VHOST_GET_BACKEND_FEATURES": self.backend_features,
            "VHOST_VDPA_GET_DEVICE_ID": self.device_id,
            "VHOST_VDPA_GET_STATUS": self.status,
            "VHOST_VDPA_GET_VRING_NUM": self.device.queue_max_sizes[0],
            "VHOST_VDPA_GET_VQS_COUNT": len(self.device.queues),
            "VHOST_VDPA_GET_CONFIG_SIZE": len(space),
        }[name]
        return value.to_bytes(len(given), "little")

    def _set(self, name: str, value: int) -> None:
        if name == "VHOST_SET_BACKEND_FEATURES":
            if value & ~self.backend_features:
                raise _os_error(errno.EOPNOTSUPP)
        elif name == "VHOST_VDPA_SET_CONFIG_CALL":
            self.config_call = value
        elif name == "VHOST_SET_FEATURES":
            if self.status & Status.FEATURES_OK:
                raise _os_error(errno.EBUSY)
            if not value & ACCESS_PLATFORM:
                raise _os_error(errno.EINVAL)
            self._acked = value
        else:
            assert name == "VHOST_VDPA_SET_STATUS"
            self._set_status(value)

    def _set_status(self, value: int) -> None:
        if value and self.status & ~value:
            raise _os_error(errno.EINVAL)
        if not value:
            self.device.reset()
            self.enabled.clear()
            for region in self._memory.regions:  # the simulated devices forget them, too
                self._memory.remove(region)
        elif value & Status.FEATURES_OK and not self.status & Status.FEATURES_OK:
            if not self.features_taken:
                return
            self.device.set_acked_features(self._acked & ~ACCESS_PLATFORM)
        elif value & Status.DRIVER_OK and not self.status & Status.DRIVER_OK:
            for index in self.enabled:
                self.device.queues[index].ready = True
            self.device.activate(self._memory, self)
        self.status = value

    # Queues

    def _set_vring(self, name: str, given: bytes) -> None:
        if not self._owned:
            raise _os_error(errno.EPERM)
        index, number = (int.from_bytes(given[i : i + 4], "little") for i in (0, 4))
        if index >= len(self.device.queues):
            raise _os_error(errno.ENOBUFS)
        queue = self.device.queues[index]
        if name == "VHOST_SET_VRING_NUM":
            if not number or number > 0xFFFF or number & (number - 1):
                raise _os_error(errno.EINVAL)
            queue.size = number
        elif name == "VHOST_SET_VRING_BASE":
            if number != (0x8000_8000 if self._acked & Feature.RING_PACKED else 0):
                raise _os_error(errno.EINVAL)
        elif name == "VHOST_SET_VRING_ADDR":
            addresses = abi.vhost_vring_addr.from_buffer_copy(given)
            if addresses.avail_user_addr & 1 or addresses.used_user_addr & 3 or addresses.flags:
                raise _os_error(errno.EINVAL)
            queue.descriptor_area = addresses.desc_user_addr
            queue.driver_area = addresses.avail_user_addr
            queue.device_area = addresses.used_user_addr
        elif name == "VHOST_VDPA_SET_VRING_ENABLE":
            self.enabled.add(index)
        else:
            if "eventfd" not in os.readlink(f"/proc/self/fd/{number}"):
                raise _os_error(errno.EINVAL)
            fds = self._kicks if name == "VHOST_SET_VRING_KICK" else self.calls_of_queues
            fds[index] = number

    def serve(self) -> None:
        """Do what the queues that were kicked ask for."""
        for index, kick in self._kicks.items():
            if select.select([kick], [], [], 0)[0]:
                os.eventfd_read(kick)
                while self.device.process_queue(index) is not None:
                    pass

    def notify_used(self, queue_index: int) -> None:
        os.eventfd_write(self.calls_of_queues[queue_index], 1)

    def notify_config(self) -> None:
        os.eventfd_write(self.config_call, 1)

    def break_down(self) -> None:
        """The device gives up, and says so."""
        self.status |= Status.DEVICE_NEEDS_RESET
        self.notify_config()

    def forget(self) -> None:
        """The last the driver hears of it: nothing of its memory is held any more."""
        self.device.reset()
        for region in self._memory.regions:
            self._memory.remove(region)

    @property
    def known_regions(self) -> tuple[Region, ...]:
        """What the device can address."""
        return self._memory.regions


@contextmanager
def vdpa_device(path: Path, device: BlockDevice) -> Iterator[FakeVdpa]:
    """``path`` is a vhost-vdpa device file meanwhile."""
    fake = FakeVdpa(path, device)
    real_ioctl, real_write = fcntl.ioctl, os.write

    def ioctl(
        fd: int, request: int, argument: bytearray | ctypes.Structure | None = None
    ) -> int:
        if fake.is_mine(fd):
            return fake.ioctl(request, argument)
        result: int = real_ioctl(fd, request, argument or 0)
        return result

    def write(fd: int, data: bytes) -> int:
        if fake.is_mine(fd):
            return fake.write(bytes(data))
        return real_write(fd, data)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(fcntl, "ioctl", ioctl))
        stack.enter_context(mock.patch.object(os, "write", write))
        stack.callback(fake.forget)
        yield fake


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
