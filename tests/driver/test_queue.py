"""The queue's methods, on every kind of ring, against our own device in this process."""

from __future__ import annotations

import errno

import pytest

from pyvmm.driver import Completion, DeviceBrokenError, QueueFullError, RequestError
from pyvmm.storage.memory import MemoryBackend
from tests.support.driver_rigs import (
    DISK_SECTORS,
    PACKED,
    SPLIT,
    DiskRig,
    RingKind,
    pattern,
)
from tests.support.rig import Hooked

DISK_BYTES = DISK_SECTORS * 512


# Every method


def test_read(rig: DiskRig) -> None:
    rig.queue.read(1024, rig.data.view[:1024], "mine")
    assert rig.finish() == [Completion("mine", 0)]
    assert rig.data_at(0, 1536) == pattern(2) + pattern(3) + bytes(512)


def test_write(rig: DiskRig) -> None:
    rig.data.view[:1024] = b"ab" * 512
    rig.queue.write(512, rig.data.view[:1024], 1)
    assert rig.finish() == [Completion(1, 0)]
    assert rig.disk[:2048] == pattern(0) + b"ab" * 512 + pattern(3)


def test_raw(rig: DiskRig) -> None:
    address = rig.data.address
    rig.data.view[:512] = b"x" * 512
    rig.queue.write_raw(0, address, 512, None)
    rig.queue.read_raw(0, address + 512, 1024, None)
    assert rig.finish() == [Completion(None, 0)] * 2
    assert rig.data_at(512, 1024) == b"x" * 512 + pattern(1)


def test_scatter_and_gather(rig: DiskRig) -> None:
    view = rig.data.view
    view[:2048] = bytes(i % 251 for i in range(2048))
    rig.queue.writev(0, [view[1:2], view[5:5], view[100:611]], "w")
    rig.queue.readv(0, [view[4096:4296], view[3000:3312]], "r")
    assert rig.finish() == [Completion("w", 0), Completion("r", 0)]
    assert rig.disk[:512] == rig.data_at(1, 1) + rig.data_at(100, 511)
    assert rig.data_at(4096, 200) + rig.data_at(3000, 312) == rig.disk[:512]


def test_discard_and_write_zeroes(rig: DiskRig) -> None:
    rig.queue.discard(512, 1024, "d")
    rig.queue.write_zeroes(2048, 512, "z")
    rig.queue.write_zeroes(3072, 512, "u", unmap=True)
    assert rig.finish() == [Completion("d", 0), Completion("z", 0), Completion("u", 0)]
    zeroes = [i for i in range(DISK_SECTORS) if rig.disk[512 * i : 512 * i + 512] == bytes(512)]
    assert zeroes == [1, 2, 4, 6]


def test_unmap_is_told_only_when_asked_for(kind: RingKind) -> None:
    class Zeroer(Hooked):
        unmaps: list[bool] = []

        def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
            self.unmaps.append(unmap)

    backend = Zeroer(MemoryBackend(bytearray(DISK_BYTES)))
    with DiskRig(kind, backend=backend) as rig:
        rig.queue.write_zeroes(0, 512, 0)
        rig.queue.write_zeroes(0, 512, 1, unmap=True)
        assert rig.finish() == [Completion(0, 0), Completion(1, 0)]
        assert backend.unmaps == [False, True]


def test_flush(kind: RingKind) -> None:
    class Flushed(Hooked):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1

    backend = Flushed(MemoryBackend(bytearray(DISK_BYTES)))
    with DiskRig(kind, backend=backend) as rig:
        rig.queue.flush("f")
        assert rig.finish() == [Completion("f", 0)]
        assert backend.flushes == 1


def test_get_id(rig: DiskRig) -> None:
    rig.data.view[:20] = b"?" * 20
    rig.queue.get_id(rig.data.view[:20], "id")
    assert rig.finish() == [Completion("id", 0)]
    assert rig.data_at(0, 20) == b"rig".ljust(20, b"\0")


def test_the_disks_errors_are_told(kind: RingKind) -> None:
    class Bad(Hooked):
        def readv(self, buffers: object, offset: int) -> None:
            raise OSError(errno.EIO, "bad sector")

    backend = Bad(MemoryBackend(bytearray(DISK_BYTES)))
    with DiskRig(kind, backend=backend) as rig:
        rig.queue.read(0, rig.data.view[:512], "r")
        rig.queue.flush("f")
        assert rig.finish() == [Completion("r", -errno.EIO), Completion("f", 0)]


# The disk's size


def test_the_disk_grows(rig: DiskRig) -> None:
    rig.disk += b"new!" * 128
    with pytest.raises(RequestError, match="not on the disk"):
        rig.queue.read(DISK_BYTES, rig.data.view[:512], 0)
    assert not rig.queue.refresh_capacity()
    assert rig.device.refresh()
    rig.transport.config_changed()
    assert rig.queue.refresh_capacity()
    assert rig.queue.capacity_bytes == DISK_BYTES + 512
    rig.queue.read(DISK_BYTES, rig.data.view[:512], 0)
    assert rig.finish() == [Completion(0, 0)]
    assert rig.data_at(0, 512) == b"new!" * 128


# Batches and full queues


def test_a_full_queue(rig: DiskRig, kind: RingKind) -> None:
    room = 16 if kind.indirect else 5  # of three descriptors each
    view, queue = rig.data.view, rig.queue
    for lap in range(7):
        for i in range(room):
            queue.read(512 * i, view[512 * i : 512 * (i + 1)], (lap, i))
        with pytest.raises(QueueFullError, match="free descriptors, the request needs"):
            queue.read(0, view[:512], "one too many")
        with pytest.raises(QueueFullError):
            queue.write_zeroes(0, 512, "one too many")
        assert queue.in_flight == room
        assert rig.finish() == [Completion((lap, i), 0) for i in range(room)]
        assert rig.data_at(0, 512 * room) == b"".join(pattern(i) for i in range(room))
        assert queue.in_flight == 0


def test_short_requests_fit_where_long_ones_do_not() -> None:
    kind = RingKind(packed=False, indirect=False, event_idx=False)
    with DiskRig(kind, queue_size=8) as rig:
        view, queue = rig.data.view, rig.queue
        queue.readv(0, [view[i : i + 128] for i in range(0, 512, 128)], "six")
        with pytest.raises(QueueFullError, match="2 free descriptors, the request needs 3"):
            queue.read(0, view[:512], "three")
        queue.flush("two")
        with pytest.raises(QueueFullError, match="0 free descriptors, the request needs 2"):
            queue.flush("two more")
        assert rig.finish() == [Completion("six", 0), Completion("two", 0)]


def test_refusal_comes_before_fullness(rig: DiskRig, kind: RingKind) -> None:
    for i in range(16 if kind.indirect else 8):
        rig.queue.flush(i)
    with pytest.raises(QueueFullError):
        rig.queue.flush(0)
    with pytest.raises(RequestError, match="not whole sectors"):
        rig.queue.read(1, rig.data.view[:512], 0)


def test_enqueueing_notifies_nobody(rig: DiskRig) -> None:
    rig.queue.read(0, rig.data.view[:512], 0)
    assert list(rig.queue.completions()) == []
    assert rig.data_at(0, 512) == bytes(512)
    assert rig.queue.avail_notif_needed()
    assert not rig.queue.avail_notif_needed()
    assert list(rig.queue.completions()) == []
    rig.transport.notify(0)
    assert list(rig.queue.completions()) == [Completion(0, 0)]
    assert list(rig.queue.completions()) == []


def test_long_requests_are_cut_into_segments(kind: RingKind) -> None:
    """The device takes 256 KiB in a segment."""
    disk = MemoryBackend(bytearray(range(256)) * 4096)
    with DiskRig(kind, backend=disk) as rig:
        rig.queue.read(0, rig.data.view, "all")
        assert rig.finish() == [Completion("all", 0)]
        assert rig.data_at(0, 1 << 20) == bytes(range(256)) * 4096


def test_requests_too_long_for_an_indirect_table(kind: RingKind) -> None:
    """Of 130 descriptors: they are chained in the ring itself."""
    pieces = [slice(4 * i, 4 * i + 4) for i in range(127)] + [slice(1000, 1004)]
    with DiskRig(kind, queue_size=256) as rig:
        for lap in range(5):
            rig.queue.readv(512 * lap, [rig.data.view[piece] for piece in pieces], "long")
            rig.queue.read(512, rig.data.view[2048:2560], "short")
            assert rig.finish() == [Completion("long", 0), Completion("short", 0)]
            assert rig.data_at(0, 508) + rig.data_at(1000, 4) == pattern(lap)


# Contexts


def test_contexts_come_back_as_they_are(rig: DiskRig) -> None:
    contexts = [None, 0, "same", "same", [], object()]
    for context in contexts:
        rig.queue.flush(context)
    assert [c.context for c in rig.finish()] == contexts


def test_completions_may_be_taken_one_at_a_time(rig: DiskRig) -> None:
    for i in range(3):
        rig.queue.flush(i)
    rig.transport.notify(0)
    taken = []
    for _ in range(3):
        taken.append(next(rig.queue.completions()).context)
        rig.queue.flush("later")
    assert taken == [0, 1, 2]
    assert [c.context for c in rig.finish()] == ["later"] * 3


def test_queues_do_not_mix() -> None:
    for kind in (SPLIT, PACKED):
        with DiskRig(kind, queues=8) as rig:
            for i, queue in enumerate(rig.queues):
                queue.read(512 * i, rig.data.view[512 * i : 512 * (i + 1)], i)
            for i in reversed(range(8)):
                assert rig.finish(i) == [Completion(i, 0)]
            assert rig.data_at(0, 4096) == b"".join(pattern(i) for i in range(8))


def test_abandoning(rig: DiskRig) -> None:
    for i in range(4):
        rig.queue.flush(i)
    rig.transport.notify(0)
    assert next(rig.queue.completions()) == Completion(0, 0)
    rig.queue.flush("x")
    rig.queue.flush("y")
    assert rig.queue.abandon() == ["x", "y"]
    assert rig.queue.abandon() == []
    with pytest.raises(DeviceBrokenError, match="abandoned"):
        rig.queue.flush("z")
    completions = rig.queue.completions()
    assert [next(completions).context for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DeviceBrokenError, match="abandoned"):
        next(completions)


def test_after_the_end(rig: DiskRig) -> None:
    queue = rig.queue
    queue.flush("done")
    rig.transport.notify(0)
    rig.transport.stop()
    queue.flush("left")
    assert list(queue.completions()) == [Completion("done", 0)]
    rig.transport.close()
    for call in (
        lambda: queue.flush(0),
        queue.avail_notif_needed,
        lambda: queue.set_used_notif_enabled(True),
        lambda: list(queue.completions()),
    ):
        with pytest.raises(DeviceBrokenError, match="the transport was closed"):
            call()
    assert queue.abandon() == ["left"]


# Notifications


def test_interrupts_only_when_wanted(rig: DiskRig) -> None:
    queue = rig.queue
    for lap in range(40):  # through the ring a few times
        wanted = bool(lap % 3)
        queue.set_used_notif_enabled(wanted)
        assert list(queue.completions()) == []
        for i in range(lap % 5 + 1):
            queue.flush(i)
        assert len(rig.finish()) == lap % 5 + 1
        assert rig.interrupted() == wanted


def test_one_interrupt_until_completions_are_collected(rig: DiskRig, kind: RingKind) -> None:
    """With EVENT_IDX: it is for the next completion, and then no more."""
    for expected in (True, not kind.event_idx):
        rig.queue.flush(0)
        rig.transport.notify(0)
        assert rig.interrupted() == expected
    assert len(list(rig.queue.completions())) == 2
    rig.queue.flush(0)
    rig.transport.notify(0)
    assert rig.interrupted()
