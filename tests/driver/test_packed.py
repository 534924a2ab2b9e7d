"""The driver's packed ring, with the test as the device: what is in memory, when either side is
notified, and devices that break the rules."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from pyvmm.driver import Completion, DeviceBrokenError
from pyvmm.virtio.spec import EventFlags
from tests.support.driver_rigs import PACKED, FakeRig, open_fds

EVENT_IDX = PACKED._replace(event_idx=True)
DIRECT = PACKED._replace(indirect=False)
NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
NO_STATUS = -errno.EPROTO


@pytest.fixture
def rig() -> Iterator[FakeRig]:
    before = open_fds()
    with FakeRig(PACKED) as rig:
        yield rig
    assert open_fds() == before


def descriptor(rig: FakeRig, slot: int) -> tuple[int, int, int, int]:
    """Address, length, buffer ID, flags."""
    at = rig.layout.descriptor + 16 * slot
    gpa, length, buffer_id, flags = struct.unpack("<QIHH", rig.ram.read(at, 16))
    return gpa, length, buffer_id, flags


def driver_event(rig: FakeRig) -> tuple[int, int, int]:
    """Flags, slot, wrap counter."""
    position, flags = struct.unpack("<HH", rig.ram.read(rig.layout.driver, 4))
    return flags, position & 0x7FFF, position >> 15


def set_device_event(rig: FakeRig, flags: int, slot: int = 0, wrap: int = 0) -> None:
    rig.ram.write(rig.layout.device, struct.pack("<HH", slot | wrap << 15, flags))


def spin(rig: FakeRig, count: int) -> None:
    """``count`` requests of one slot, each used before the next one."""
    for slot in range(count):
        rig.submit(slot)
        rig.put_used_descriptor(slot % rig.size, 0, wrap=1 - slot // rig.size % 2)
        assert list(rig.queue.completions()) == [Completion(slot, NO_STATUS)]


# What the device finds


def test_an_indirect_request_as_it_is_in_memory(rig: FakeRig) -> None:
    data = rig.data.address
    rig.queue.readv(1536, [rig.data.view[:512], rig.data.view[1024:1536]], "r")
    _, length, buffer_id, flags = descriptor(rig, 0)
    assert (length, buffer_id, flags) == (64, 0, INDIRECT | AVAIL)
    header, first, second, status = rig.table_of(0, packed=True)
    assert header[1:] == (16, 0, 0)
    assert rig.ram.read(header[0], 16) == struct.pack("<IIQ", 0, 0, 3)
    assert first == (data, 512, WRITE, 0)
    assert second == (data + 1024, 512, WRITE, 0)
    assert status[1:] == (1, WRITE, 0)
    assert rig.ram.read(status[0], 1) == b"\xff"


def test_a_direct_request_as_it_is_in_memory() -> None:
    with FakeRig(DIRECT) as rig:
        rig.queue.write(512, rig.data.view[:512], "w")
        chain = [descriptor(rig, slot) for slot in range(4)]
        assert [entry[1:] for entry in chain] == [
            (16, 0, NEXT | AVAIL),
            (512, 0, NEXT | AVAIL),
            (1, 0, WRITE | AVAIL),
            (0, 0, 0),
        ]
        assert rig.ram.read(chain[0][0], 16) == struct.pack("<IIQ", 1, 0, 1)
        assert chain[1][0] == rig.data.address


def test_the_second_lap_has_the_other_flags() -> None:
    with FakeRig(DIRECT) as rig:
        rig.submit("a", "b")
        for slot, buffer_id in ((0, 1), (3, 0)):
            rig.put_used_descriptor(slot, buffer_id)
        assert [c.context for c in rig.queue.completions()] == ["b", "a"]
        rig.submit("round the end")
        flags = [descriptor(rig, slot)[3] for slot in (6, 7, 0)]
        assert flags == [NEXT | AVAIL, NEXT | WRITE | AVAIL, WRITE | USED]
        rig.put_used_descriptor(6, 0)
        assert [c.context for c in rig.queue.completions()] == ["round the end"]
        rig.submit("second lap")
        assert descriptor(rig, 1)[3] == NEXT | USED
        rig.put_used_descriptor(1, 0, wrap=0)
        assert [c.context for c in rig.queue.completions()] == ["second lap"]


# Notifications


def test_the_device_wants_none(rig: FakeRig) -> None:
    rig.submit("a")
    set_device_event(rig, EventFlags.DISABLE)
    assert not rig.queue.avail_notif_needed()
    rig.submit("b")
    set_device_event(rig, EventFlags.ENABLE)
    assert rig.queue.avail_notif_needed()
    assert not rig.queue.avail_notif_needed()


@pytest.mark.parametrize("flags", [EventFlags.DESC, 3])
def test_flags_that_were_not_negotiated_ask_for_all(rig: FakeRig, flags: int) -> None:
    rig.submit("a")
    set_device_event(rig, flags, slot=5)
    assert rig.queue.avail_notif_needed()


@pytest.mark.parametrize("done", range(0, 20, 3))
@pytest.mark.parametrize("pushed", [1, 3, 8])
def test_the_device_wants_one_for_a_certain_slot(done: int, pushed: int) -> None:
    """``back`` slots before the next one: asked for when it was pushed since the last look."""
    for back in range(9):
        with FakeRig(EVENT_IDX) as rig:
            spin(rig, done)
            rig.queue.avail_notif_needed()
            rig.submit(*range(pushed))
            lap, slot = divmod(done + pushed - back, rig.size)
            set_device_event(rig, EventFlags.DESC, slot=slot, wrap=1 - lap % 2)
            assert rig.queue.avail_notif_needed() == (1 <= back <= pushed)
            assert not rig.queue.avail_notif_needed()


def test_no_interrupts_without_event_idx(rig: FakeRig) -> None:
    assert driver_event(rig)[0] == EventFlags.ENABLE
    rig.queue.set_used_notif_enabled(False)
    assert driver_event(rig)[0] == EventFlags.DISABLE
    rig.queue.set_used_notif_enabled(True)
    assert driver_event(rig)[0] == EventFlags.ENABLE


def test_the_slot_used_next_is_to_be_announced() -> None:
    with FakeRig(EVENT_IDX) as rig:
        assert driver_event(rig) == (EventFlags.DESC, 0, 1)
        spin(rig, 11)
        assert driver_event(rig) == (EventFlags.DESC, 3, 0)
        rig.queue.set_used_notif_enabled(False)
        assert driver_event(rig)[0] == EventFlags.DISABLE
        rig.queue.set_used_notif_enabled(True)
        assert driver_event(rig) == (EventFlags.DESC, 3, 0)


# Devices that break the rules


def check_broken(rig: FakeRig, problem: str, outstanding: list[object]) -> None:
    for _ in range(2):
        with pytest.raises(DeviceBrokenError, match=problem):
            list(rig.queue.completions())
    with pytest.raises(DeviceBrokenError, match=problem):
        rig.queue.flush("late")
    assert rig.queue.abandon() == outstanding


@pytest.mark.parametrize("buffer_id", [2, 7, 8, 0x7FFF, 0xFFFF])
def test_a_buffer_id_that_is_not_in_flight(rig: FakeRig, buffer_id: int) -> None:
    rig.submit("a", "b")
    rig.put_used_descriptor(0, buffer_id)
    check_broken(rig, f"buffer ID {buffer_id}, which is not in flight", ["a", "b"])


def test_the_same_buffer_id_twice(rig: FakeRig) -> None:
    """What it used before comes first."""
    rig.submit("a", "b", "c")
    rig.put_used_descriptor(0, 1)
    rig.put_used_descriptor(1, 1)
    completions = rig.queue.completions()
    assert next(completions) == Completion("b", NO_STATUS)
    with pytest.raises(DeviceBrokenError):
        next(completions)
    check_broken(rig, "buffer ID 1, which is not in flight", ["a", "c"])


def test_more_used_than_was_ever_available(rig: FakeRig) -> None:
    rig.submit("a")
    for slot in range(8):
        rig.put_used_descriptor(slot, 0)
    assert list(rig.queue.completions()) == [Completion("a", NO_STATUS)]
    rig.submit("b")  # overwrites what the device put there
    assert list(rig.queue.completions()) == []
    rig.submit("c")
    rig.put_used_descriptor(1, 9)
    check_broken(rig, "buffer ID 9, which is not in flight", ["b", "c"])


def test_a_device_that_scribbles_over_everything(rig: FakeRig) -> None:
    """Free slots and chains are known elsewhere."""
    for lap in range(20):
        rig.submit(lap)
        slot, wrap = lap % rig.size, 1 - lap // rig.size % 2
        assert rig.transport.is_mapped(descriptor(rig, slot)[0], 48)
        rig.ram.write(rig.layout.descriptor, b"\xff" * 16 * rig.size)
        rig.ram.write(rig.layout.driver, b"\xff" * 4)
        rig.put_used_descriptor(slot, 0, wrap)
        assert list(rig.queue.completions()) == [Completion(lap, NO_STATUS)]
