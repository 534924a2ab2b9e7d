"""Disks as objects: what each opens, what it refuses, and that a wrapper costs no merging."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyvmm.api.config import disk
from pyvmm.api.disks import (
    Disk,
    DiskWrapper,
    FaultyDisk,
    MemoryDisk,
    NbdDisk,
    Overlay,
    RawDisk,
    as_disk,
)
from pyvmm.errors import ConfigError
from pyvmm.storage.backend import BlockBackend

SIZE = 1 << 20


def any_object(what: object) -> Any:
    """Return ``what``, whatever the type checker says."""
    return what


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk of 1 MiB."""
    found = tmp_path / "disk.img"
    found.write_bytes(b"\1" * SIZE)
    return found


@contextlib.contextmanager
def opened(disk: Disk) -> Iterator[BlockBackend]:
    said: list[str] = []
    with contextlib.ExitStack() as made:
        backend = disk.open(report=said.append, until_s=None, made=made)
        with contextlib.closing(backend):
            yield backend
        made.pop_all()
    assert said == []


def read(backend: BlockBackend, offset: int = 0, length: int = 512) -> bytes:
    data = bytearray(length)
    backend.readv([memoryview(data)], offset)
    return bytes(data)


def write(backend: BlockBackend, data: bytes, offset: int = 0) -> None:
    backend.writev([memoryview(data)], offset)


def test_a_file_is_opened_anew_for_each_machine(path: Path) -> None:
    disk = RawDisk(path)
    for value in (b"\2", b"\3"):
        with opened(disk) as backend:
            assert (backend.size_bytes, backend.read_only, backend.merges) == (SIZE, False, True)
            write(backend, value * 512)
            assert read(backend) == value * 512
    with opened(RawDisk(path, read_only=True)) as backend, pytest.raises(OSError, match="Read"):
        write(backend, bytes(512))


def test_memory_keeps_what_was_written() -> None:
    disk = MemoryDisk(b"\1" * 1024)
    with opened(disk) as backend:
        write(backend, b"\2" * 512, 512)
    with opened(disk) as backend:
        assert read(backend, 0, 1024) == b"\1" * 512 + b"\2" * 512 == bytes(disk.data)
    with opened(MemoryDisk(2048)) as backend:
        assert (backend.size_bytes, read(backend)) == (2048, bytes(512))


@pytest.mark.parametrize("base_is_file", [True, False])
def test_an_overlay_never_writes_its_base(path: Path, base_is_file: bool, tmp_path: Path) -> None:
    memory = MemoryDisk(b"\1" * SIZE)
    base: Path | MemoryDisk = path if base_is_file else memory
    with opened(Overlay(base)) as backend:
        write(backend, b"\2" * 4096)
        assert read(backend, 0, 4096) == b"\2" * 4096
    kept = Overlay(base, tmp_path / "kept.overlay")
    for value in (b"\1", b"\2"):
        with opened(kept) as backend:
            assert read(backend, 0, 4096) == value * 4096
            write(backend, b"\2" * 4096)
            backend.flush()
    assert path.read_bytes() == bytes(memory.data) == b"\1" * SIZE


def test_faults_are_counted_anew_for_each_machine() -> None:
    disk = FaultyDisk(MemoryDisk(SIZE), "read 2: EIO\n")
    for _ in range(2):
        with opened(disk) as backend:
            assert not backend.merges, "a merged request would be one fewer to count"
            read(backend)
            with pytest.raises(OSError, match="Input/output") as caught:
                read(backend)
            assert caught.value.errno == errno.EIO


class Counting(DiskWrapper):
    """A backend of a user's."""

    def __init__(self, inner: BlockBackend) -> None:
        super().__init__(inner)
        self.reads = 0

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.reads += 1
        super().readv(buffers, offset)


def test_a_wrapper_passes_on_all_that_it_does_not_override(path: Path) -> None:
    said: list[str] = []
    inner = RawDisk(path).open(report=said.append)
    mine = Counting(inner)
    for name in ("size_bytes", "read_only", "block_size", "can_discard", "can_write_zeroes",
                 "merges", "extra_calls"):
        assert getattr(mine, name) == getattr(inner, name), name
    with opened(as_disk(mine)) as backend:
        assert backend is mine
        read(backend)
        backend.writev([memoryview(bytes(512))], 0, durable=True)
        backend.write_zeroes(0, 512, unmap=False)
        backend.discard(0, 512)
        backend.flush()
        assert (mine.reads, backend.refresh_size()) == (1, SIZE)
        backend.hurry(float("inf"))
    assert said == []
    with pytest.raises(OSError, match="Bad file descriptor"):  # the machine has closed it
        read(inner)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RawDisk(""), "names no file"),
        (lambda: RawDisk("a\0b"), "names no file"),
        (lambda: MemoryDisk(0), "a multiple of 512 up to 1T"),
        (lambda: MemoryDisk(b"x"), "has 1 bytes"),
        (lambda: MemoryDisk(1 << 41), "up to 1T"),
        (lambda: NbdDisk("disk.img"), "is no nbd://"),
        (lambda: FaultyDisk(MemoryDisk(512), "read sometimes"), "FaultyDisk's script"),
    ],
)
def test_a_mistake_is_one_clear_error(make: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()  # type: ignore[operator]


class HalfABackend:
    size_bytes, read_only = 512, False


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RawDisk(any_object(3)), "RawDisk takes a path, not int"),
        (lambda: MemoryDisk(any_object("1M")), "takes bytes, or its size as an int, not str"),
        (lambda: MemoryDisk(True), "not bool"),
        (lambda: as_disk(None), "NoneType is no path, no disk of pyvmm, and no BlockBackend$"),
        (lambda: as_disk(b"disk.img"), "bytes is no path, no disk of pyvmm, and no BlockBackend$"),
        (lambda: as_disk(HalfABackend()), "no BlockBackend: it lacks block_size, can_discard"),
        (lambda: as_disk(MemoryDisk), "is the class MemoryDisk: make an object of it"),
        (lambda: Overlay(any_object(None)), "NoneType is no path"),
        (lambda: disk("f", serial=any_object(3)), "serial must be str, not int"),
        (lambda: disk("f", queues=any_object("2")), "queues must be int, not str"),
        (lambda: disk("f", writeback=any_object("on")), "must be True or False, not 'on'"),
        (lambda: disk("f", rate_limit=any_object(5)), "must be RateLimit or None, not int"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_type_error(make: object, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make()  # type: ignore[operator]


def test_a_missing_file_is_said_when_the_machine_is_built(tmp_path: Path) -> None:
    disk = RawDisk(tmp_path / "missing.img")
    with pytest.raises(ConfigError, match=r"missing\.img"), opened(disk):
        pass
