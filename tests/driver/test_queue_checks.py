"""What the queue refuses before anything is queued, against our own device in this process."""

from __future__ import annotations

import pytest

from pyvmm.driver import Completion, RequestError
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.spec import BlockFeature
from tests.support.driver_rigs import DISK_SECTORS, DiskRig, RingKind

DISK_BYTES = DISK_SECTORS * 512


def check_refusals(rig: DiskRig, refusals: list[tuple[str, tuple[object, ...], str]]) -> None:
    """Calls by method name and arguments (a context is added) are refused with a message, and
    nothing of them is queued."""
    for name, arguments, problem in refusals:
        with pytest.raises(RequestError, match=problem):
            getattr(rig.queue, name)(*arguments, "context")
    assert rig.queue.in_flight == 0
    assert rig.finish() == []
    rig.queue.read(0, rig.data.view[:512], "fine")
    assert rig.finish() == [Completion("fine", 0)]


def test_what_cannot_be_asked(rig: DiskRig) -> None:
    view, address, end = rig.data.view, rig.data.address, rig.data.address + rig.data.length
    check_refusals(
        rig,
        [
            ("read", (1, view[:512]), "512 bytes at 1 are not whole sectors"),
            ("read", (0, view[:511]), "511 bytes at 0 are not whole sectors"),
            ("read", (0, view[:0]), "0 bytes at 0 are not on the disk"),
            ("read", (-512, view[:512]), "at -512 are not on the disk"),
            ("read", (DISK_BYTES - 512, view[:1024]), f"not on the disk, which has {DISK_BYTES}"),
            ("write", (DISK_BYTES, view[:512]), "not on the disk"),
            ("write", (1 << 80, view[:512]), "not on the disk"),
            ("readv", (0, []), "0 bytes at 0 are not on the disk"),
            ("readv", (0, [view[:1], view[:510]]), "511 bytes"),
            ("writev", (0, [view[:1]] * 512), "more than 14 segments"),
            ("read_raw", (0, address - 512, 512), "in no mapped region"),
            ("read_raw", (0, end - 256, 512), "in no mapped region"),
            ("write_raw", (0, 0, 512), "in no mapped region"),
            ("write_raw", (0, -512, 512), "in no mapped region"),
            ("write_raw", (0, address, -512), "a buffer of -512 bytes"),
            ("read", (0, memoryview(bytearray(512))), "in no mapped region"),
            ("read", (0, memoryview(bytes(512))), "has no address"),
            ("write", (0, view[:1024:2]), "has no address"),
            ("read", (0, bytearray(512)), "the buffer is of type bytearray; it is to be a view"),
            ("write", (0, bytes(512)), "the buffer is of type bytes"),
            ("read", (view[:512], 0), "the buffer is of type int"),
            ("discard", (1, 512), "not whole sectors"),
            ("discard", (0, 0), "not on the disk"),
            ("discard", (0, DISK_BYTES + 512), "not on the disk"),
            ("discard", (0, 2 << 30 | 512), "discard of 2147484160 bytes; the limit is 2147483648"),
            ("write_zeroes", (0, 8 << 20 | 512), "write-zeroes of .* bytes; the limit is 8388608"),
            ("write_zeroes", (DISK_BYTES, 512), "not on the disk"),
            ("get_id", (view[:19],), "a device ID of 19 bytes; it has 20"),
            ("get_id", (memoryview(bytearray(20)),), "in no mapped region"),
        ],
    )


def test_a_read_only_disk(kind: RingKind) -> None:
    config = BlockConfig(queue_size=16, read_only=True)
    with DiskRig(kind, config=config) as rig:
        assert rig.queue.read_only
        view = rig.data.view
        check_refusals(
            rig,
            [
                ("write", (0, view[:512]), "the disk is read-only"),
                ("writev", (0, [view[:512]]), "the disk is read-only"),
                ("write_raw", (0, rig.data.address, 512), "the disk is read-only"),
                # The device does not even offer these.
                ("discard", (0, 512), "VIRTIO_BLK_F_DISCARD was not negotiated"),
                ("write_zeroes", (0, 512), "VIRTIO_BLK_F_WRITE_ZEROES was not negotiated"),
            ],
        )


def test_what_was_not_negotiated() -> None:
    has_not = int(BlockFeature.FLUSH | BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES)
    with DiskRig(config=BlockConfig(queue_size=16, disabled_features=has_not)) as rig:
        check_refusals(
            rig,
            [
                ("flush", (), "VIRTIO_BLK_F_FLUSH was not negotiated"),
                ("discard", (0, 512), "VIRTIO_BLK_F_DISCARD was not negotiated"),
                ("write_zeroes", (0, 512), "VIRTIO_BLK_F_WRITE_ZEROES was not negotiated"),
            ],
        )


def test_memory_that_was_unmapped(rig: DiskRig) -> None:
    rig.transport.unmap_mem_region(rig.data.address, rig.data.length)
    with pytest.raises(RequestError, match="in no mapped region"):
        rig.queue.read(0, rig.data.view[:512], 0)
    rig.transport.map_mem_region(rig.data.address, rig.data.length, rig.data.fd)
    rig.queue.read(0, rig.data.view[:512], 0)
    assert rig.finish() == [Completion(0, 0)]
