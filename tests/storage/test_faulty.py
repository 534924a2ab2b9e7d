"""FaultyBackend and its scripts: each fault happens when, and only when, the script says."""

from __future__ import annotations

import errno

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.fault_script import Effect, Operation, parse_script
from pyvmm.storage.faulty import FaultyBackend
from pyvmm.storage.memory import MemoryBackend
from tests.support.power_cut import Flush, RecordingBackend
from tests.support.raw_disks import room


def disk_with(script: str) -> tuple[FaultyBackend, bytearray]:
    data = bytearray(b"." * (16 * 512))
    return FaultyBackend(MemoryBackend(data), parse_script(script, "faults")), data


def test_the_nth_write_fails_and_no_other() -> None:
    disk, data = disk_with("write 2: EIO\nwrite 3-4: ENOSPC")
    errors = []
    for number in range(6):
        try:
            disk.writev([memoryview(bytes([number]) * 512)], number * 512)
        except OSError as error:
            errors.append((number, error.errno))
    assert errors == [(1, errno.EIO), (2, errno.ENOSPC), (3, errno.ENOSPC)]
    assert data[: 6 * 512 : 512] == bytes([0]) + b"..." + bytes([4, 5])


def test_from_then_on() -> None:
    disk, _ = disk_with("read 2+: EIO")
    disk.readv(room(512), 0)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output"):
            disk.readv(room(512), 0)


def test_bad_sectors() -> None:
    disk, _ = disk_with("read * sectors 4-5: EIO\nwrite 2 sector 4: EIO")
    for first, count, is_bad in [(0, 4, False), (3, 2, True), (5, 1, True), (6, 9, False)]:
        if is_bad:
            with pytest.raises(OSError, match="Input/output"):
                disk.readv(room(count * 512), first * 512)
        else:
            disk.readv(room(count * 512), first * 512)
    disk.writev(room(512), 4 * 512)
    disk.writev(room(512), 0)  # does not count
    with pytest.raises(OSError, match="Input/output"):
        disk.writev(room(1024), 3 * 512)


def test_torn_write() -> None:
    disk, data = disk_with("write 1: torn 512\nwrite 2: torn 700 EIO")
    disk.writev([memoryview(b"a" * 300), memoryview(b"b" * 724)], 0)  # and says all is well
    assert data[:1024] == b"a" * 300 + b"b" * 212 + b"." * 512
    with pytest.raises(OSError, match="Input/output"):
        disk.writev([memoryview(b"c" * 1024)], 2048)
    assert data[2048 : 2048 + 1024] == b"c" * 700 + b"." * 324


def test_short_read() -> None:
    disk, _ = disk_with("read 1: short 100\nread 2: short 0 ETIMEDOUT")
    buffers = room(512)
    with pytest.raises(OSError, match="Input/output"):
        disk.readv(buffers, 0)
    assert buffers[0] == b"." * 100 + bytes(412)
    with pytest.raises(OSError, match="timed out"):
        disk.readv(buffers, 0)


def test_lost_flush() -> None:
    recorder = RecordingBackend(MemoryBackend(bytearray(1024)))
    disk = FaultyBackend(recorder, parse_script("flush 2: lost\nwrite 1: lost", "faults"))
    for _ in range(3):
        disk.flush()
    assert recorder.log == [Flush(), Flush()]
    disk.writev([memoryview(b"w" * 512)], 0)
    assert recorder.log == [Flush(), Flush()]


def test_delays_come_first_and_add_up() -> None:
    slept: list[float] = []
    disk = FaultyBackend(
        MemoryBackend(bytearray(1024)),
        parse_script("write 2: EIO\nany *: delay 0.5\nwrite 2: delay 2", "faults"),
        sleep=slept.append,
    )
    disk.writev(room(512), 0)
    with pytest.raises(OSError, match="Input/output"):
        disk.writev(room(512), 0)
    disk.discard(0, 512)
    assert slept == [0.5, 0.5, 2.0, 0.5]


def test_a_real_delay_is_short_here() -> None:
    disk, data = disk_with("write *: delay 0.001")
    disk.writev([memoryview(b"w" * 512)], 0)
    assert data[:512] == b"w" * 512


def test_failed_flush_is_latched() -> None:
    disk, _ = disk_with("flush 1: ENOSPC")
    for match in ("No space", "earlier flush"):
        with pytest.raises(OSError, match=match):
            disk.flush()
    with pytest.raises(OSError, match="earlier flush"):
        disk.writev(room(512), 0, durable=True)
    disk.writev(room(512), 0)


def test_failed_durable_write_is_latched() -> None:
    disk, _ = disk_with("write 1-2: EIO")
    with pytest.raises(OSError, match="Input/output"):
        disk.writev(room(512), 0)
    disk.flush()
    with pytest.raises(OSError, match="Input/output"):
        disk.writev(room(512), 0, durable=True)
    with pytest.raises(OSError, match="earlier flush"):
        disk.flush()


def test_discard_and_zeroes() -> None:
    disk, data = disk_with("discard 1: EIO\nzeroes 1: lost\nzeroes 2: EIO")
    with pytest.raises(OSError, match="Input/output"):
        disk.discard(0, 512)
    disk.write_zeroes(0, 512, unmap=True)
    with pytest.raises(OSError, match="Input/output"):
        disk.write_zeroes(0, 512, unmap=True)
    assert data == b"." * len(data)
    disk.write_zeroes(0, 512, unmap=True)
    assert data[:512] == bytes(512)


def test_the_first_of_two_effects_wins_and_both_count() -> None:
    disk, _ = disk_with("read 1: EIO\nread 1: ENOSPC\nread 2: ENOSPC")
    with pytest.raises(OSError, match="Input/output"):
        disk.readv(room(512), 0)
    with pytest.raises(OSError, match="No space"):
        disk.readv(room(512), 0)
    disk.readv(room(512), 0)


def test_a_script() -> None:
    first, second = parse_script(
        "# a comment\n\n  write 5-7 sectors 100-200 : torn 512 EIO  # why\nany *: delay 0.25\n", "f"
    )
    assert first.operations == {Operation.WRITE}
    assert (first.first, first.last, first.sectors) == (5, 7, range(100, 201))
    assert (first.effect, first.length, first.error) == (Effect.TORN, 512, errno.EIO)
    assert second.operations == set(Operation)
    assert (second.first, second.last, second.sectors) == (1, None, None)
    assert (second.effect, second.delay_s) == (Effect.DELAY, 0.25)


@pytest.mark.parametrize(("line", "problem"), [
    ("write", "'write 3: EIO'"), ("write: EIO", "no fault"), ("write 0: EIO", "first operation"),
    ("write 3-2: EIO", "3-2 is no count"), ("wrote 3: EIO", "no operation 'wrote'"),
    ("write 3: ENOFUN", "ENOFUN"), ("write 3: explode", "explode"), ("write 3: torn", "torn"),
    ("write 3: short 5", "only a read"), ("any 3: torn 5", "only a write"),
    ("write 3: torn 1.5", "torn 1.5"), ("write 3: delay", "delay"), ("write 3: 512", "512"),
    ("read 3: lost", "cannot be lost"), ("any 3: lost", "cannot be lost"),
    ("flush 3 sectors 1-2: EIO", "no sectors"), ("read * sectors 5-4: EIO", "are none"),
    ("write 3: lost EIO", "lost EIO"), ("write ٣: EIO", "no fault"), ("read -1: EIO", "no fault"),
])
def test_a_line_that_makes_no_sense(line: str, problem: str) -> None:
    with pytest.raises(ConfigError, match="line 2: ") as caught:
        parse_script(f"\n{line}", "my.faults")
    assert caught.value.subject == "my.faults"
    assert problem in caught.value.problem
    assert "\n" not in str(caught.value)
