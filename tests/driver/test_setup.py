"""``VirtioBlkQueue.setup_queues``: what is negotiated, refused, and put into memory."""

from __future__ import annotations

import itertools

import pytest

from pyvmm.driver import RequestError, SharedMemory, TransportError, VirtioBlkQueue
from pyvmm.driver.queue import DRIVER_FEATURES
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.driver_rigs import (
    PACKED,
    SPLIT,
    FakeRig,
    FakeTransport,
    RingKind,
    block_config,
    open_fds,
)

FEATURES = DRIVER_FEATURES & ~int(BlockFeature.RO)


def without(*features: int) -> int:
    """What a device offers that lacks ``features``."""
    offered = FEATURES
    for feature in features:
        offered &= ~int(feature)
    return offered


def test_accepts_what_it_knows_of_what_is_offered() -> None:
    offered = FEATURES | int(Feature.IN_ORDER | Feature.RING_RESET | BlockFeature.CONFIG_WCE)
    with FakeTransport(offered | 1 << 50) as transport:
        VirtioBlkQueue.setup_queues(transport, 2, 8)
        assert transport.acked_features == FEATURES
        assert transport.calls == ["negotiate", "map", "setup_queues"]


def test_accepts_no_more_than_it_is_told_to() -> None:
    with FakeTransport() as transport:
        wanted = int(Feature.VERSION_1 | BlockFeature.FLUSH | BlockFeature.RO)
        VirtioBlkQueue.setup_queues(transport, 1, 8, features=wanted)
        assert transport.acked_features == wanted & ~int(BlockFeature.RO)


@pytest.mark.parametrize(
    ("num_queues", "queue_size", "offered", "config", "problem"),
    [
        (1, 8, without(Feature.VERSION_1), b"", "VIRTIO_F_VERSION_1 is needed"),
        (0, 8, FEATURES, b"", "0 queues; the device has 2"),
        (3, 8, FEATURES, b"", "3 queues; the device has 2"),
        (2, 8, without(BlockFeature.MQ), b"", "2 queues; the device has 1"),
        (1, 8, FEATURES, block_config(num_queues=0), "1 queues; the device has 0"),
        (3, 8, FEATURES, block_config(num_queues=9), "3 queues are not within 1 to 2"),
        (1, 2, FEATURES, b"", "queue size 2 is not within 3 to 256"),
        (1, 512, FEATURES, b"", "queue size 512 is not within 3 to 256"),
        (1, 12, without(Feature.RING_PACKED), b"", "queue size 12 is not a power of 2"),
    ],
)
def test_refusals(
    num_queues: int, queue_size: int, offered: int, config: bytes, problem: str
) -> None:
    before = open_fds()
    with FakeTransport(offered, config) as transport:
        with pytest.raises(TransportError, match=problem):
            VirtioBlkQueue.setup_queues(transport, num_queues, queue_size)
        assert transport.queues == ()
    assert open_fds() == before


def test_a_device_that_refuses() -> None:
    with FakeTransport() as transport:
        transport.refusal = TransportError("the device does not like it")
        with pytest.raises(TransportError, match="does not like it"):
            VirtioBlkQueue.setup_queues(transport, 1, 8)


@pytest.mark.parametrize("kind", [SPLIT, PACKED], ids=str)
def test_every_area_is_aligned_mapped_and_its_own(kind: RingKind) -> None:
    with FakeTransport() as transport:
        VirtioBlkQueue.setup_queues(transport, 2, 64, features=kind.features)
        areas = []
        for queue in transport.queues:
            assert queue.size == 64
            driver_bytes, device_bytes = (4, 4) if kind.packed else (6 + 2 * 64, 6 + 8 * 64)
            areas += [
                (queue.descriptor, 16 * 64, 16),
                (queue.driver, driver_bytes, 4),
                (queue.device, device_bytes, 4),
            ]
        for address, length, alignment in areas:
            assert address % alignment == 0
            assert transport.is_mapped(address, length)
        areas.sort()
        for (address, length, _), (following, _, _) in itertools.pairwise(areas):
            assert address + length <= following


@pytest.mark.parametrize("size", [3, 5, 12, 255])
def test_packed_rings_of_any_size(size: int) -> None:
    with FakeRig(PACKED, queue_size=size) as rig:
        rig.submit(*range(size))
        assert rig.queue.in_flight == size


# Limits of the device's, which nothing of ours has


def test_segments_are_cut_to_size_max_and_counted() -> None:
    with FakeRig(config=block_config(size_max=1024, seg_max=4)) as rig:
        rig.queue.read_raw(0, rig.data.address, 2560, 0)
        segments = rig.table_of(0)[1:-1]
        assert [(gpa - rig.data.address, length) for gpa, length, _, _ in segments] == [
            (0, 1024),
            (1024, 1024),
            (2048, 512),
        ]
        with pytest.raises(RequestError, match="more than 4 segments of 1024 bytes"):
            rig.queue.write_raw(0, rig.data.address, 4608, 0)


def test_a_tiny_size_max_costs_no_time() -> None:
    with (
        FakeRig(config=block_config(sectors=1 << 40, size_max=1)) as rig,
        pytest.raises(RequestError, match="more than 4 segments of 1 bytes"),
    ):
        rig.queue.read_raw(0, rig.data.address, 1 << 40, 0)


def test_a_read_only_disk_that_offers_what_writes() -> None:
    with FakeTransport(DRIVER_FEATURES) as transport:
        (queue,) = VirtioBlkQueue.setup_queues(transport, 1, 8)
        for refused in (queue.discard, queue.write_zeroes):
            with pytest.raises(RequestError, match="the disk is read-only"):
                refused(0, 512, 0)


def test_a_device_without_limits() -> None:
    offered = without(BlockFeature.SIZE_MAX, BlockFeature.SEG_MAX, Feature.RING_PACKED)
    with FakeTransport(offered) as transport, SharedMemory(1 << 20) as data:
        transport.map_mem_region(data.address, data.length, data.fd)
        (queue,) = VirtioBlkQueue.setup_queues(transport, 1, 8)
        queue.read_raw(0, data.address, 32 << 10, 0)  # all of the disk in one segment
        queue.writev(0, [data.view[i : i + 256] for i in range(0, 1536, 256)], 1)  # six
        with pytest.raises(RequestError, match="more than 6 segments"):
            queue.readv(0, [data.view[i : i + 512] for i in range(0, 3584, 512)], 2)


def test_a_size_max_of_0_is_none() -> None:
    """qemu-storage-daemon's."""
    with FakeRig(config=block_config(size_max=0)) as rig:
        rig.queue.read_raw(0, rig.data.address, 32 << 10, 0)
        ((_, length, _, _),) = rig.table_of(0)[1:-1]
        assert length == 32 << 10


def test_a_seg_max_of_0_is_1() -> None:
    with FakeRig(config=block_config(seg_max=0)) as rig:
        rig.submit("fine")
        with pytest.raises(RequestError, match="more than 1 segments"):
            rig.queue.readv(0, [rig.data.view[:256], rig.data.view[256:512]], 0)


def test_limits_of_discard_and_write_zeroes() -> None:
    config = block_config(max_discard_sectors=2, max_write_zeroes_sectors=0)
    with FakeRig(config=config) as rig:
        rig.queue.discard(0, 1024, 0)
        with pytest.raises(RequestError, match="discard of 1536 bytes; the limit is 1024"):
            rig.queue.discard(0, 1536, 0)
        rig.queue.write_zeroes(0, 32 << 10, 0)  # 0 is no limit
