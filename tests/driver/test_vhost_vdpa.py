"""The vhost-vdpa transport, against the stand-in for the kernel of tests/support/fake_vdpa.py."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.driver import vhost_abi as abi
from pyvmm.driver.errors import DeviceBrokenError, TransportError
from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.queue import DRIVER_FEATURES
from pyvmm.driver.transport import QueueLayout
from pyvmm.driver.vhost_vdpa import VhostVdpaTransport
from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.spec import Feature, Status
from tests.support.driver_client import Client
from tests.support.fake_vdpa import ACCESS_PLATFORM, FakeVdpa, vdpa_device

QUEUES = 2
V1 = int(Feature.VERSION_1)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[FakeVdpa]:
    backend = MemoryBackend(bytearray(1 << 20))
    device = BlockDevice(BlockConfig(queues=QUEUES, queue_size=64), backend)
    with vdpa_device(tmp_path / "vhost-vdpa-0", device) as fake:
        yield fake


@pytest.fixture
def transport(kernel: FakeVdpa) -> Iterator[VhostVdpaTransport]:
    with VhostVdpaTransport(kernel.path) as transport:
        yield transport


def layouts(address: int, count: int = QUEUES, size: int = 16) -> list[QueueLayout]:
    return [
        QueueLayout(size, start, start + 0x400, start + 0x800)
        for start in range(address, address + count * 4096, 4096)
    ]


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


# The handshake


def test_the_order_of_the_handshake(kernel: FakeVdpa) -> None:
    """The kernel's own: owner first, a reset, ACKNOWLEDGE and DRIVER before features are read,
    memory and rings before DRIVER_OK."""
    with SharedMemory(4096) as memory, VhostVdpaTransport(kernel.path) as transport:
        transport.negotiate(V1)
        transport.map_mem_region(memory.address, memory.length, memory.fd)
        transport.setup_queues(layouts(memory.address, count=1))
        assert kernel.names == [
            "VHOST_SET_OWNER",
            "VHOST_VDPA_GET_DEVICE_ID",
            "VHOST_GET_BACKEND_FEATURES",
            "VHOST_SET_BACKEND_FEATURES",
            "VHOST_VDPA_SET_STATUS",
            *2 * ["VHOST_VDPA_SET_STATUS", "VHOST_VDPA_GET_STATUS"],
            "VHOST_GET_FEATURES",
            "VHOST_VDPA_GET_IOVA_RANGE",
            "VHOST_VDPA_GET_VQS_COUNT",
            "VHOST_VDPA_GET_VRING_NUM",
            "VHOST_VDPA_GET_CONFIG_SIZE",
            "VHOST_VDPA_SET_CONFIG_CALL",
            "VHOST_SET_FEATURES",
            *["VHOST_VDPA_SET_STATUS", "VHOST_VDPA_GET_STATUS"],
            "IOTLB UPDATE",
            "VHOST_SET_VRING_NUM",
            "VHOST_SET_VRING_BASE",
            "VHOST_SET_VRING_ADDR",
            "VHOST_SET_VRING_KICK",
            "VHOST_SET_VRING_CALL",
            "VHOST_VDPA_SET_VRING_ENABLE",
            *["VHOST_VDPA_SET_STATUS", "VHOST_VDPA_GET_STATUS"],
        ]
        statuses = [given[0] for name, given in kernel.calls if name == "VHOST_VDPA_SET_STATUS"]
        assert statuses == [0, 1, 3, 11, 15]
    assert kernel.names[-1] == "VHOST_VDPA_SET_STATUS"
    assert kernel.status == 0


def test_what_the_device_has(kernel: FakeVdpa, transport: VhostVdpaTransport) -> None:
    assert transport.features == kernel.device.avail_features
    assert transport.max_queues == QUEUES
    assert transport.max_queue_size == 64
    assert transport.max_mem_regions > 1000


def test_the_configuration_space(kernel: FakeVdpa, transport: VhostVdpaTransport) -> None:
    space = kernel.device.read_config(0, 60)
    assert transport.get_config(0, 60) == space
    assert transport.get_config(0, 8) == (2048).to_bytes(8, "little")
    assert transport.get_config(34, 2) == QUEUES.to_bytes(2, "little")


def test_the_configuration_space_is_zeros_behind_its_end(
    kernel: FakeVdpa, transport: VhostVdpaTransport
) -> None:
    space = kernel.device.read_config(0, 60)
    assert transport.get_config(50, 30) == space[50:].ljust(30, b"\0")
    assert transport.get_config(60, 4) == bytes(4)
    assert transport.get_config(1000, 4) == bytes(4)


def test_access_platform_is_negotiated_without_the_caller(
    kernel: FakeVdpa, transport: VhostVdpaTransport
) -> None:
    transport.negotiate(V1)
    (given,) = [given for name, given in kernel.calls if name == "VHOST_SET_FEATURES"]
    assert int.from_bytes(given, "little") == V1 | ACCESS_PLATFORM
    assert not transport.features & ACCESS_PLATFORM
    assert transport.acked_features == V1
    assert kernel.device.acked_features == V1


def test_features_the_device_does_not_take(
    kernel: FakeVdpa, transport: VhostVdpaTransport
) -> None:
    kernel.features_taken = False
    with pytest.raises(TransportError, match="does not take status FEATURES_OK"):
        transport.negotiate(V1)


def test_negotiating_twice_resets_the_device_and_gives_it_its_memory_again(
    kernel: FakeVdpa, transport: VhostVdpaTransport
) -> None:
    with SharedMemory(4096) as memory:
        transport.map_mem_region(memory.address, 4096, memory.fd)
        transport.negotiate(V1)
        transport.negotiate(V1 | int(Feature.EVENT_IDX))
        assert kernel.device.acked_features == V1 | Feature.EVENT_IDX
        assert [region.gpa for region in kernel.known_regions] == [memory.address]


def test_a_stopped_device_touches_nothing_any_more(
    kernel: FakeVdpa, transport: VhostVdpaTransport
) -> None:
    with SharedMemory(8192) as memory:
        transport.map_mem_region(memory.address, 8192, memory.fd)
        transport.negotiate(V1)
        transport.setup_queues(layouts(memory.address))
        assert [region.gpa for region in kernel.known_regions] == [memory.address]
        transport.stop()
        transport.stop()
        assert kernel.names[-1] == "VHOST_VDPA_SET_STATUS"
        assert kernel.known_regions == ()
        assert not kernel.device.is_activated


def test_another_kind_of_device_is_refused(kernel: FakeVdpa) -> None:
    kernel.device_id = 1
    before = open_fds()
    with pytest.raises(TransportError, match="virtio device 1, not a block device"):
        VhostVdpaTransport(kernel.path)
    assert open_fds() == before


def test_a_kernel_without_iotlb_messages_of_version_2_is_refused(kernel: FakeVdpa) -> None:
    kernel.backend_features = 0
    with pytest.raises(TransportError, match="no IOTLB messages of version 2"):
        VhostVdpaTransport(kernel.path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"vhost-vdpa-9: cannot be opened: No such file"):
        VhostVdpaTransport(tmp_path / "vhost-vdpa-9")


def test_a_file_that_is_no_device(tmp_path: Path) -> None:
    """No stand-in here: the kernel's own ENOTTY."""
    (tmp_path / "file").touch()
    before = open_fds()
    with pytest.raises(TransportError, match=r"file: VHOST_SET_OWNER: Inappropriate ioctl"):
        VhostVdpaTransport(tmp_path / "file")
    assert open_fds() == before


@pytest.mark.parametrize("name", [
    "VHOST_SET_OWNER", "VHOST_VDPA_GET_DEVICE_ID", "VHOST_GET_BACKEND_FEATURES",
    "VHOST_SET_BACKEND_FEATURES", "VHOST_VDPA_SET_STATUS", "VHOST_VDPA_GET_STATUS",
    "VHOST_GET_FEATURES", "VHOST_VDPA_GET_IOVA_RANGE", "VHOST_VDPA_GET_VQS_COUNT",
    "VHOST_VDPA_GET_VRING_NUM", "VHOST_VDPA_GET_CONFIG_SIZE", "VHOST_VDPA_SET_CONFIG_CALL",
])
def test_an_ioctl_that_fails_at_the_start_leaves_nothing_open(
    kernel: FakeVdpa, name: str
) -> None:
    kernel.refuse[name] = errno.EPERM
    before = open_fds()
    with pytest.raises(TransportError, match=rf"vhost-vdpa-0: {name}: Operation not permitted"):
        VhostVdpaTransport(kernel.path)
    assert open_fds() == before


# Memory


def test_memory_is_told_by_its_address_in_this_process(
    kernel: FakeVdpa, transport: VhostVdpaTransport
) -> None:
    with SharedMemory(8192) as memory:
        transport.map_mem_region(memory.address, 8192, memory.fd)
        name, raw = kernel.calls[-1]
        message = abi.vhost_msg_v2.from_buffer_copy(raw)
        assert name == "IOTLB UPDATE"
        assert len(raw) == 72
        assert message.type == abi.VHOST_IOTLB_MSG_V2
        part = message.iotlb
        assert (part.iova, part.uaddr) == (memory.address, memory.address)
        assert (part.size, part.perm) == (8192, abi.VHOST_ACCESS_RW)
        transport.unmap_mem_region(memory.address, 8192)
        assert kernel.names[-1] == "IOTLB INVALIDATE"
        assert not kernel.mappings


def test_memory_the_device_cannot_address(kernel: FakeVdpa) -> None:
    kernel.iova_range = (0x1000, 0xFFFF)
    with (
        VhostVdpaTransport(kernel.path) as transport,
        SharedMemory(4096) as memory,
        pytest.raises(TransportError, match=r"outside what the device can .*, 0x1000 to 0xffff"),
    ):
        transport.map_mem_region(memory.address, 4096, memory.fd)
    assert not kernel.mappings


def test_memory_the_kernel_refuses(kernel: FakeVdpa, transport: VhostVdpaTransport) -> None:
    with SharedMemory(4096) as memory:
        kernel.iova_range = (0, 0xFFFF)  # but it said otherwise
        with pytest.raises(TransportError, match=r"cannot be mapped: Bad address .*RLIMIT_MEMLOCK"):
            transport.map_mem_region(memory.address, 4096, memory.fd)
        assert transport.regions == ()


# Queues


@pytest.mark.parametrize("packed", [False, True])
def test_queues_begin_where_their_format_says(
    kernel: FakeVdpa, transport: VhostVdpaTransport, packed: bool
) -> None:
    with SharedMemory(8192) as memory:
        transport.map_mem_region(memory.address, 8192, memory.fd)
        transport.negotiate(V1 | (int(Feature.RING_PACKED) if packed else 0))
        transport.setup_queues(layouts(memory.address))
        bases = [given for name, given in kernel.calls if name == "VHOST_SET_VRING_BASE"]
        base = 0x8000_8000 if packed else 0
        assert bases == [
            index.to_bytes(4, "little") + base.to_bytes(4, "little") for index in range(2)
        ]
        transport.stop()


def test_kick_and_call(kernel: FakeVdpa, transport: VhostVdpaTransport) -> None:
    """Each queue has its own; reading the completion fd takes what the device signalled."""
    with SharedMemory(8192) as memory:
        transport.map_mem_region(memory.address, 8192, memory.fd)
        transport.negotiate(V1)
        transport.setup_queues(layouts(memory.address))
        fds = {f(i) for f in (transport.submission_fd, transport.completion_fd) for i in (0, 1)}
        assert len(fds) == 4
        transport.notify(1)
        assert os.eventfd_read(transport.submission_fd(1)) == 1
        kernel.notify_used(0)
        assert select.select([transport.completion_fd(0), transport.completion_fd(1)], [], [], 0)[
            0
        ] == [transport.completion_fd(0)]
        transport.stop()


@pytest.mark.parametrize("name", [
    "VHOST_SET_VRING_NUM", "VHOST_SET_VRING_BASE", "VHOST_SET_VRING_ADDR",
    "VHOST_SET_VRING_KICK", "VHOST_SET_VRING_CALL", "VHOST_VDPA_SET_VRING_ENABLE",
    "VHOST_VDPA_SET_STATUS",
])
def test_a_queue_that_is_refused_can_be_set_up_later(
    kernel: FakeVdpa, transport: VhostVdpaTransport, name: str
) -> None:
    with SharedMemory(8192) as memory:
        transport.map_mem_region(memory.address, 8192, memory.fd)
        transport.negotiate(V1)
        before = open_fds()
        kernel.refuse[name] = errno.EINVAL
        with pytest.raises(TransportError, match=f"{name}: Invalid argument"):
            transport.setup_queues(layouts(memory.address))
        assert open_fds() == before
        kernel.refuse.clear()
        transport.setup_queues(layouts(memory.address))
        assert kernel.device.is_activated
        transport.stop()


@pytest.mark.parametrize("packed", [False, True])
def test_requests(kernel: FakeVdpa, transport: VhostVdpaTransport, packed: bool) -> None:
    """All the way: what VirtioBlkQueue writes on one queue it reads on the other."""
    features = DRIVER_FEATURES if packed else DRIVER_FEATURES & ~int(Feature.RING_PACKED)
    with Client(
        transport, queues=QUEUES, size=16, features=features, serve=kernel.serve
    ) as client:
        for number in range(40):
            client.write(number * 4096, bytes([number]) * 4096, index=number % 2)
        for number in range(40):
            content = client.read(number * 4096, 4096, index=1 - number % 2)
            assert content == bytes([number]) * 4096
        client.queue.write_zeroes(0, 8192, "zeroes")
        client.queue.flush("flush")
        assert client.rets(2) == {"zeroes": 0, "flush": 0}
        assert client.read(4096, 8192) == bytes(4096) + bytes([2]) * 4096


# Later


def test_a_device_that_breaks_down_says_so(
    kernel: FakeVdpa, transport: VhostVdpaTransport
) -> None:
    transport.check()
    kernel.break_down()
    assert select.select([transport], [], [], 0)[0] == [transport]
    for _ in range(2):
        with pytest.raises(DeviceBrokenError, match=r"vhost-vdpa-0: the device needs a reset"):
            transport.check()


def test_a_changed_configuration_is_no_breakdown(
    kernel: FakeVdpa, transport: VhostVdpaTransport
) -> None:
    kernel.notify_config()
    assert select.select([transport], [], [], 0)[0]
    transport.check()
    assert not select.select([transport], [], [], 0)[0]


def test_stopping_a_device_that_is_gone(kernel: FakeVdpa) -> None:
    before = open_fds()
    with SharedMemory(8192) as memory, VhostVdpaTransport(kernel.path) as transport:
        transport.map_mem_region(memory.address, 8192, memory.fd)
        transport.negotiate(V1)
        transport.setup_queues(layouts(memory.address))
        kernel.refuse = {"VHOST_VDPA_SET_STATUS": errno.ENODEV, "VHOST_VDPA_GET_STATUS": errno.EIO}
        with pytest.raises(DeviceBrokenError, match="VHOST_VDPA_GET_STATUS: Input/output error"):
            transport.check()
        transport.stop()
        kernel.forget()
    assert open_fds() == before


def test_closing_leaves_nothing_open(kernel: FakeVdpa) -> None:
    before = open_fds()
    transport = VhostVdpaTransport(kernel.path)
    transport.close()
    transport.close()
    assert open_fds() == before
    assert kernel.status & ~Status.DRIVER == Status.ACKNOWLEDGE  # never set up: left to the kernel
    with pytest.raises(TransportError, match="closed"):
        transport.get_config(0, 8)
