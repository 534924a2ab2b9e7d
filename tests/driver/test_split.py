"""The driver's split ring, with the test as the device: what is in memory, when either side is
notified, and devices that break the rules."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator

import pytest

from pyvmm.driver import Completion, DeviceBrokenError
from pyvmm.virtio.spec import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY
from tests.support.driver_rigs import (
    SPLIT,
    DiskRig,
    FakeRig,
    RingKind,
    block_config,
    open_fds,
)

EVENT_IDX = SPLIT._replace(event_idx=True)
DIRECT = SPLIT._replace(indirect=False)
NEXT, WRITE, INDIRECT = 1, 2, 4


@pytest.fixture
def rig() -> Iterator[FakeRig]:
    before = open_fds()
    with FakeRig(SPLIT) as rig:
        yield rig
    assert open_fds() == before


def descriptor(rig: FakeRig, index: int) -> tuple[int, int, int, int]:
    """Address, length, flags, next."""
    at = rig.layout.descriptor + 16 * index
    gpa, length, flags, following = struct.unpack("<QIHH", rig.ram.read(at, 16))
    return gpa, length, flags, following


def avail(rig: FakeRig) -> tuple[int, ...]:
    """flags, idx, ring, used_event."""
    length = 6 + 2 * rig.size
    return struct.unpack(f"<{length // 2}H", rig.ram.read(rig.layout.driver, length))


# What the device finds


def test_an_indirect_request_as_it_is_in_memory(rig: FakeRig) -> None:
    data = rig.data.address
    rig.queue.read_raw(1536, data, 1024, "r")
    table, length, flags, _ = descriptor(rig, 0)
    assert (length, flags) == (48, INDIRECT)
    assert rig.transport.is_mapped(table, length)
    header, body, status = rig.table_of(0)
    assert header[1:] == (16, NEXT, 1)
    assert rig.ram.read(header[0], 16) == struct.pack("<IIQ", 0, 0, 3)
    assert body == (data, 1024, NEXT | WRITE, 2)
    assert status[1:3] == (1, WRITE)
    assert rig.ram.read_int(status[0], 1) == 0xFF
    assert avail(rig)[:3] == (0, 1, 0)


def test_a_direct_request_as_it_is_in_memory() -> None:
    with FakeRig(DIRECT) as rig:
        data = rig.data.address
        rig.queue.writev(512, [rig.data.view[:500], rig.data.view[600:612]], "w")
        chain = [descriptor(rig, i) for i in range(4)]
        assert [entry[2:] for entry in chain] == [(NEXT, 1), (NEXT, 2), (NEXT, 3), (WRITE, 0)]
        assert rig.ram.read(chain[0][0], chain[0][1]) == struct.pack("<IIQ", 1, 0, 1)
        assert chain[1][:2] == (data, 500)
        assert chain[2][:2] == (data + 600, 12)
        assert rig.ram.read(chain[3][0], chain[3][1]) == b"\xff"
        assert avail(rig)[:3] == (0, 1, 0)


def test_a_flush_and_a_discard_as_they_are_in_memory(rig: FakeRig) -> None:
    rig.queue.flush("f")
    header, status = rig.table_of(0)
    assert header[1:] == (16, NEXT, 1)
    assert rig.ram.read(header[0], 16) == struct.pack("<IIQ", 4, 0, 0)
    assert status[1:3] == (1, WRITE)
    rig.queue.discard(1024, 2048, "d")
    header, body, status = rig.table_of(1)
    assert rig.ram.read(header[0], 16) == struct.pack("<IIQ", 11, 0, 0)
    assert body[2:] == (NEXT, 2)
    assert rig.ram.read(body[0], body[1]) == struct.pack("<QII", 2, 4, 0)
    assert avail(rig)[:4] == (0, 2, 0, 1)


def test_a_table_has_room_for_128_descriptors() -> None:
    config = block_config(seg_max=200)
    with FakeRig(SPLIT, queue_size=256, config=config) as rig:

        def read(pieces: int) -> None:
            view = rig.data.view
            bytewise = [view[i : i + 1] for i in range(pieces - 1)]
            rig.queue.readv(0, [*bytewise, view[pieces:513]], pieces)

        read(126)
        assert descriptor(rig, 0)[1:3] == (128 * 16, INDIRECT)
        read(127)
        assert descriptor(rig, 1)[1:] == (16, NEXT, 2)


# How requests end


@pytest.mark.parametrize(
    ("status", "ret"),
    [(0, 0), (1, -errno.EIO), (2, -errno.ENOTSUP), (3, -errno.EPROTO), (0xFF, -errno.EPROTO)],
)
def test_status_bytes(rig: FakeRig, status: int, ret: int) -> None:
    rig.submit("r")
    rig.set_status(0, status)
    rig.put_used(0)
    assert list(rig.queue.completions()) == [Completion("r", ret)]


def test_a_status_that_was_skipped_is_seen_in_a_slot_used_before(rig: FakeRig) -> None:
    for status, ret in ((0, 0), (None, -errno.EPROTO)):
        rig.submit("r")
        if status is not None:
            rig.set_status(0, status)
        rig.put_used(0)
        assert list(rig.queue.completions()) == [Completion("r", ret)]


def test_any_order(rig: FakeRig) -> None:
    rig.submit("a", "b", "c")
    for head in (2, 0):
        rig.set_status(head, 0)
        rig.put_used(head)
    assert list(rig.queue.completions()) == [Completion("c", 0), Completion("a", 0)]
    rig.submit("d")
    assert rig.queue.abandon() == ["b", "d"]


# Notifications


def test_the_device_wants_none(rig: FakeRig) -> None:
    rig.submit("a")
    rig.ram.write_int(rig.layout.device, 2, USED_F_NO_NOTIFY)
    assert not rig.queue.avail_notif_needed()
    rig.submit("b")
    rig.ram.write_int(rig.layout.device, 2, 0)
    assert rig.queue.avail_notif_needed()
    assert not rig.queue.avail_notif_needed()


@pytest.mark.parametrize("event", range(-2, 10))
def test_the_device_wants_one_when_an_entry_is_put_at_avail_event(event: int) -> None:
    with FakeRig(EVENT_IDX, queue_size=16) as rig:
        rig.submit(0, 1)
        rig.queue.avail_notif_needed()
        rig.ram.write_int(rig.layout.device + 4 + 8 * rig.size, 2, event & 0xFFFF)
        rig.submit(2, 3, 4)
        assert rig.queue.avail_notif_needed() == (2 <= event <= 4)
        assert not rig.queue.avail_notif_needed()


def test_no_interrupts_without_event_idx(rig: FakeRig) -> None:
    assert avail(rig)[0] == 0
    rig.queue.set_used_notif_enabled(False)
    assert avail(rig)[0] == AVAIL_F_NO_INTERRUPT
    rig.queue.set_used_notif_enabled(True)
    assert avail(rig)[0] == 0


def test_used_event_is_the_next_one_or_far_away() -> None:
    with FakeRig(EVENT_IDX) as rig:
        for lap in range(20):
            assert avail(rig)[0] == 0
            assert avail(rig)[-1] == lap
            rig.queue.set_used_notif_enabled(False)
            assert avail(rig)[-1] == (lap - 1) & 0xFFFF
            rig.queue.set_used_notif_enabled(True)
            rig.submit(lap)
            rig.put_used(0)
            assert len(list(rig.queue.completions())) == 1


@pytest.mark.parametrize("kind", [SPLIT, EVENT_IDX], ids=str)
def test_indices_go_on_past_65536(kind: RingKind) -> None:
    with DiskRig(kind, queue_size=256) as rig:
        for lap in range(65536 // 256 + 3):
            for i in range(256):
                rig.queue.flush(i)
            rig.queue.set_used_notif_enabled(bool(lap % 2))
            assert len(rig.finish()) == 256
            assert rig.interrupted() == bool(lap % 2)


def test_a_notification_is_due_when_nobody_asked_for_65536_entries() -> None:
    """Their indices would say that there was none."""
    with DiskRig(EVENT_IDX, queue_size=256) as rig:
        for _ in range(65536 // 256):
            for i in range(256):
                rig.queue.flush(i)
            rig.transport.notify(0)
            assert len(list(rig.queue.completions())) == 256
        assert rig.queue.avail_notif_needed()


# Devices that break the rules


def check_broken(rig: FakeRig, problem: str, outstanding: list[object]) -> None:
    """Every method says what is broken, and ``outstanding`` is handed back."""
    queue = rig.queue
    calls: list[Callable[[], object]] = [
        lambda: list(queue.completions()),
        lambda: queue.read_raw(0, rig.data.address, 512, "late"),
        lambda: queue.discard(0, 512, "late"),
        lambda: queue.flush("late"),
        queue.avail_notif_needed,
        lambda: queue.set_used_notif_enabled(False),
        lambda: list(queue.completions()),
    ]
    for call in calls:
        with pytest.raises(DeviceBrokenError, match=problem):
            call()
    assert queue.abandon() == outstanding
    assert queue.in_flight == 0
    with pytest.raises(DeviceBrokenError, match=problem):
        queue.flush("late")


@pytest.mark.parametrize("head", [2, 7, 8, 0xFFFF, 0x1_0000, 0x8000_0000, 0xFFFF_FFFF])
def test_a_used_id_that_is_not_in_flight(rig: FakeRig, head: int) -> None:
    rig.submit("a", "b")
    rig.put_used(head)
    check_broken(rig, f"used element of id {head}, which is not in flight", ["a", "b"])


def test_a_used_id_inside_a_chain() -> None:
    with FakeRig(DIRECT) as rig:
        rig.submit("a")
        rig.put_used(1)
        check_broken(rig, "id 1, which is not in flight", ["a"])


def test_the_same_id_twice(rig: FakeRig) -> None:
    """What it used before comes first."""
    rig.submit("a", "b", "c")
    rig.set_status(1, 0)
    rig.put_used(1)
    rig.put_used(1)
    completions = rig.queue.completions()
    assert next(completions) == Completion("b", 0)
    with pytest.raises(DeviceBrokenError):
        next(completions)
    check_broken(rig, "id 1, which is not in flight", ["a", "c"])


@pytest.mark.parametrize("idx", [3, 9, 0x8000, 0xFFFF])
def test_a_used_index_too_far_ahead(rig: FakeRig, idx: int) -> None:
    rig.submit("a", "b")
    rig.ram.write_int(rig.layout.device + 2, 2, idx)
    check_broken(rig, f"used.idx is {idx} ahead, with 2 requests in flight", ["a", "b"])


def test_a_used_index_too_far_ahead_of_what_is_left(rig: FakeRig) -> None:
    rig.submit("a", "b", "c")
    rig.put_used(1)
    rig.put_used(0)
    assert len(list(rig.queue.completions())) == 2
    rig.ram.write_int(rig.layout.device + 2, 2, 4)
    check_broken(rig, "used.idx is 2 ahead, with 1 requests in flight", ["c"])


def test_a_used_index_that_goes_back(rig: FakeRig) -> None:
    rig.submit("a", "b")
    rig.put_used(0)
    assert len(list(rig.queue.completions())) == 1
    rig.ram.write_int(rig.layout.device + 2, 2, 0)
    check_broken(rig, "used.idx is 65535 ahead", ["b"])


@pytest.mark.parametrize("kind", [SPLIT, DIRECT, EVENT_IDX], ids=str)
def test_a_device_that_scribbles_over_the_drivers_part(kind: RingKind) -> None:
    """Nothing there is read back: free descriptors, chains and indices are known elsewhere."""
    with FakeRig(kind) as rig:
        for lap in range(20):
            rig.submit(lap)
            assert rig.transport.is_mapped(descriptor(rig, 0)[0], 16)
            assert avail(rig)[1] == lap + 1
            assert avail(rig)[2 + lap % rig.size] == 0
            rig.ram.write(rig.layout.descriptor, b"\xff" * 16 * rig.size)
            rig.ram.write(rig.layout.driver, b"\xff" * (6 + 2 * rig.size))
            rig.put_used(0)
            assert list(rig.queue.completions()) == [Completion(lap, -errno.EPROTO)]
