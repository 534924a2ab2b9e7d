"""MemoryBackend: what its buffer does to it."""

from __future__ import annotations

import mmap

import pytest

from pyvmm.storage.memory import MemoryBackend
from tests.support.raw_disks import room


def test_the_buffer_is_the_disk() -> None:
    buffer = bytearray(2048)
    disk = MemoryBackend(buffer)
    disk.writev([memoryview(b"a" * 512)], 512)
    assert buffer == bytes(512) + b"a" * 512 + bytes(1024)
    buffer[0:512] = b"b" * 512
    buffers = room(1024)
    disk.readv(buffers, 0)
    assert buffers[0] == b"b" * 512 + b"a" * 512


def test_a_mapping_is_a_buffer() -> None:
    with mmap.mmap(-1, 4096) as mapping:
        disk = MemoryBackend(mapping)
        disk.writev([memoryview(b"m" * 512)], 0)
        disk.close()
        assert mapping[:512] == b"m" * 512


def test_bytes_are_read_only() -> None:
    for buffer, read_only in ((bytes(1024), False), (bytearray(1024), True)):
        disk = MemoryBackend(buffer, read_only=read_only)
        assert (disk.read_only, disk.can_discard, disk.can_write_zeroes) == (True, False, False)
        with pytest.raises(OSError, match="Read-only"):
            disk.writev(room(512), 0)
        with pytest.raises(OSError, match="Read-only"):
            disk.discard(0, 512)
        with pytest.raises(OSError, match="Read-only"):
            disk.write_zeroes(0, 512, unmap=False)


def test_a_tail_is_no_sector() -> None:
    assert MemoryBackend(bytearray(1300)).size_bytes == 1024


def test_a_bytearray_that_changes_its_length() -> None:
    buffer = bytearray(1024)
    disk = MemoryBackend(buffer)
    buffer.extend(bytes(1024))
    assert disk.size_bytes == 1024
    with pytest.raises(OSError, match="leave the disk"):
        disk.readv(room(512), 1024)
    assert disk.refresh_size() == 2048
    disk.writev([memoryview(b"e" * 512)], 1536)
    assert buffer[1536:] == b"e" * 512
    del buffer[512:]  # without a word
    with pytest.raises(OSError, match="leave the disk"):
        disk.readv(room(512), 512)
