"""The transport to a device in this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from pyvmm.driver import (
    Completion,
    DeviceBrokenError,
    SharedMemory,
    TransportError,
    VirtioBlkQueue,
)
from pyvmm.driver.in_process import InProcessTransport
from pyvmm.driver.transport import QueueLayout
from pyvmm.errors import GuestError
from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import Feature
from tests.support.driver_rigs import DISK_SECTORS, SPLIT, DiskRig, is_readable, open_fds, pattern

V1 = int(Feature.VERSION_1)


@pytest.fixture
def rig() -> Iterator[DiskRig]:
    before = open_fds()
    with DiskRig(SPLIT, queues=3) as rig:
        yield rig
    assert open_fds() == before


def new_device(backend: MemoryBackend | None = None) -> BlockDevice:
    return BlockDevice(
        BlockConfig(queues=3, queue_size=64), backend or MemoryBackend(bytearray(4096))
    )


def test_shows_what_the_device_has() -> None:
    device = new_device()
    with InProcessTransport(device) as transport:
        assert transport.features == device.avail_features
        assert transport.max_queues == 3
        assert transport.max_queue_size == 64
        assert transport.max_mem_regions == 32
        assert transport.get_config(0, 8) == (8).to_bytes(8, "little")
        assert transport.get_config(1, 60) == device.read_config(1, 60)
        assert transport.get_config(0, 0xF00)[60:] == bytes(0xF00 - 60)
        for offset, length in ((-1, 4), (0, -1), (0xF00, 1), (0, 0xF01)):
            with pytest.raises(TransportError, match="3840 of configuration space"):
                transport.get_config(offset, length)


def test_a_device_that_refuses_features() -> None:
    class Fussy(BlockDevice):
        def set_acked_features(self, features: int) -> None:
            raise GuestError("not these")

    device = Fussy(BlockConfig(), MemoryBackend(bytearray(4096)))
    with (
        InProcessTransport(device) as transport,
        pytest.raises(TransportError, match=r"refused: .*not these"),
    ):
        transport.negotiate(V1)


def test_queues_that_the_device_refuses() -> None:
    before = open_fds()
    with InProcessTransport(new_device()) as transport:
        transport.negotiate(V1)
        fds = set()
        for _ in range(2):
            with pytest.raises(DeviceBrokenError, match="queue 0: the descriptor table"):
                transport.setup_queues([QueueLayout(8, 0x1000, 0x2000, 0x3000)])
            fds.add(open_fds())
        assert len(fds) == 1
        transport.negotiate(V1)
        assert transport.queues == ()
    assert open_fds() == before


def test_memory_that_cannot_be_mapped(rig: DiskRig) -> None:
    read_end, write_end = os.pipe()
    try:
        for fd, offset in ((read_end, 0), (rig.data.fd, rig.data.length), (1 << 40, 0)):
            with pytest.raises(TransportError, match=r"memory region 0x1000.* cannot be mapped"):
                rig.transport.map_mem_region(0x1000, 4096, fd, offset)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert not rig.transport.is_mapped(0x1000, 4096)


def test_a_region_anywhere_in_an_fd(rig: DiskRig) -> None:
    """The address is only a name: the device looks into the fd."""
    with SharedMemory(3 * 4096) as memory:
        rig.transport.map_mem_region(0x7000, 4096, memory.fd, 2 * 4096)
        rig.queue.read_raw(0, 0x7000, 512, 0)
        assert rig.finish() == [Completion(0, 0)]
        assert bytes(memory.view[8192:8704]) == pattern(0)
        rig.transport.unmap_mem_region(0x7000, 4096)


def test_writing_to_a_submission_fd_is_served_later(rig: DiskRig) -> None:
    rig.queues[1].read(512, rig.data.view[:512], "a")
    os.eventfd_write(rig.transport.submission_fd(1), 1)
    assert list(rig.queues[1].completions()) == []
    assert rig.transport.serve() is None
    assert list(rig.queues[1].completions()) == [Completion("a", 0)]
    assert not is_readable(rig.transport.submission_fd(1))
    rig.queues[1].flush("not notified")
    assert rig.transport.serve() is None
    assert list(rig.queues[1].completions()) == []


def test_one_interrupt_for_all_queues(rig: DiskRig) -> None:
    assert not rig.interrupted(0)
    rig.queue.flush("a")
    rig.transport.notify(0)
    assert [rig.interrupted(i) for i in range(3)] == [True] * 3
    assert [rig.interrupted(i) for i in range(3)] == [False] * 3


def test_work_that_a_rate_limit_leaves_behind() -> None:
    now = 100.0
    device = BlockDevice(
        BlockConfig(queue_size=16, rate_limit=RateLimit(ops_per_s=10)),
        MemoryBackend(bytearray(DISK_SECTORS * 512)),
        clock=lambda: now,
    )
    with InProcessTransport(device) as transport, SharedMemory(4096) as data:
        transport.map_mem_region(data.address, data.length, data.fd)
        (queue,) = VirtioBlkQueue.setup_queues(transport, 1, 16)
        for i in range(3):
            queue.read(0, data.view[:512], i)
        transport.notify(0)
        done = [c.context for c in queue.completions()]
        assert done == [0]
        while queue.in_flight:
            delay_s = transport.serve()
            done += [c.context for c in queue.completions()]
            assert delay_s is None or 0 < delay_s < 0.11
            now += delay_s or 0
        assert done == [0, 1, 2]
        assert transport.serve() is None


def test_a_device_that_needs_a_reset_says_why(rig: DiskRig) -> None:
    rig.transport.check()
    assert not is_readable(rig.transport.fileno())
    rig.queue.flush("lost")
    layout = rig.transport.queues[0]
    ring, _ = rig.transport._mappings[rig.transport.regions[-1].address]
    at = layout.driver - ring.gpa
    ring.view[at + 2 : at + 4] = b"\xff\xff"  # avail.idx
    rig.transport.notify(0)
    assert is_readable(rig.transport.fileno())
    for _ in range(2):
        with pytest.raises(DeviceBrokenError, match=r"queue 0: avail.idx is 65535 ahead"):
            rig.transport.check()
    assert list(rig.queue.completions()) == []
    assert rig.queue.abandon() == ["lost"]


def test_a_change_of_configuration_is_announced(rig: DiskRig) -> None:
    rig.transport.config_changed()
    assert is_readable(rig.transport.fileno())
    rig.transport.check()
    rig.queue.flush(0)
    assert rig.finish() == [Completion(0, 0)]
    assert not is_readable(rig.transport.fileno())


def test_queues_there_are_not(rig: DiskRig) -> None:
    for index in (-1, 3):
        for call in (
            rig.transport.notify,
            rig.transport.submission_fd,
            rig.transport.completion_fd,
        ):
            with pytest.raises(TransportError, match=f"queue {index} is not set up; there are 3"):
                call(index)


def test_stopping(rig: DiskRig) -> None:
    rig.queue.flush("done")
    rig.transport.notify(0)
    rig.transport.stop()
    assert rig.interrupted()
    assert list(rig.queue.completions()) == [Completion("done", 0)]
    with pytest.raises(TransportError, match="queue 0 was stopped"):
        rig.transport.notify(0)
    os.eventfd_write(rig.transport.submission_fd(0), 1)
    assert rig.transport.serve() is None


def test_after_closing(rig: DiskRig) -> None:
    transport = rig.transport
    transport.close()
    for call in (
        lambda: transport.notify(0),
        lambda: transport.submission_fd(0),
        lambda: transport.completion_fd(0),
        transport.serve,
        transport.check,
        lambda: transport.features,
        lambda: transport.get_config(0, 8),
    ):
        with pytest.raises(TransportError, match="is closed"):
            call()
    transport.close()


def test_no_fd_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(initial: int, flags: int = 0) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = open_fds()
    with InProcessTransport(new_device()) as transport, monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", fail)
        with pytest.raises(TransportError, match="eventfds of 1 queues: Too many open files"):
            VirtioBlkQueue.setup_queues(transport, 1, 16)
        with pytest.raises(TransportError, match="no eventfd: Too many open files"):
            InProcessTransport(new_device())
    assert open_fds() == before
