"""The recording backend: its images are all that a power cut may leave, and nothing else."""

from __future__ import annotations

import random

from pyvmm.storage.memory import MemoryBackend
from tests.support.power_cut import Flush, Note, PowerCut, RecordingBackend, Write, power_cuts


def fill(byte: bytes, sectors: int = 1) -> list[memoryview]:
    return [memoryview(byte * (512 * sectors))]


def cuts(disk: RecordingBackend, count: int) -> list[PowerCut]:
    return list(power_cuts(disk, random.Random(1), count))


def seen(disk: RecordingBackend, count: int) -> set[bytes]:
    """A letter a sector, of every image."""
    return {bytes(cut.image[::512]) for cut in cuts(disk, count)}


def test_everything_is_kept_and_passed_on() -> None:
    memory = MemoryBackend(bytearray(b"." * 1024))
    disk = RecordingBackend(memory)
    disk.writev([memoryview(b"a" * 500), memoryview(b"b" * 12)], 512)
    disk.note("n")
    disk.flush()
    disk.writev(fill(b"c"), 0, durable=True)
    disk.write_zeroes(512, 512, unmap=True)
    assert disk.log == [
        Write(512, b"a" * 500 + b"b" * 12), Note("n"), Flush(), Write(0, b"c" * 512, durable=True),
        Write(512, bytes(512)),
    ]
    content = bytearray(1024)
    disk.readv([memoryview(content)], 0)
    assert content == b"c" * 512 + bytes(512)
    assert disk.initial == b"." * 1024


def test_unflushed_writes_are_there_in_every_mixture() -> None:
    disk = RecordingBackend(MemoryBackend(bytearray(b"." * 1536)))
    disk.writev(fill(b"a", 2), 0)  # may be torn
    disk.writev(fill(b"b", 2), 512)
    assert seen(disk, 600) == {
        left + middle + right for left in (b".", b"a") for middle in (b".", b"a", b"b")
        for right in (b".", b"b")
    }


def test_flushed_writes_are_there() -> None:
    disk = RecordingBackend(MemoryBackend(bytearray(b"." * 1024)))
    disk.writev(fill(b"a"), 0)
    disk.flush()
    disk.note("flushed")
    disk.writev(fill(b"b"), 512)
    disk.flush()
    found = {(bytes(cut.image[::512]), len(cut.notes)) for cut in cuts(disk, 100)}
    assert found == {(b"..", 0), (b"a.", 0), (b"a.", 1), (b"ab", 1)}


def test_a_durable_write_is_there_before_any_flush() -> None:
    disk = RecordingBackend(MemoryBackend(bytearray(b"." * 1024)))
    disk.writev(fill(b"a"), 0)
    disk.writev(fill(b"b", 2), 0, durable=True)
    disk.writev(fill(b"c"), 0)
    assert seen(disk, 100) == {b"bb", b"cb"}


def test_as_many_images_as_asked_for() -> None:
    disk = RecordingBackend(MemoryBackend(bytearray(1024)))
    for _ in range(7):
        disk.writev(fill(b"a"), 0)
        disk.flush()
    for count in (0, 3, 8, 21):
        assert len(cuts(disk, count)) == count
