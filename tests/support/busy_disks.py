"""Disks that call a function in the midst of each transfer, and have bad sectors."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.raw import RawBackend


class _Busy(Protocol):
    """``on_io`` is called in the middle of each transfer; one that touches ``bad`` fails."""

    on_io: Callable[[], None]
    bad: frozenset[int]


def _enter(backend: _Busy, offset: int, length: int) -> None:
    backend.on_io()
    if backend.bad.intersection(range(offset // 512, (offset + length) // 512)):
        raise OSError(errno.EIO, "bad sector")


class BusyRaw(RawBackend):
    """A file."""

    on_io: Callable[[], None] = staticmethod(lambda: None)
    bad: frozenset[int] = frozenset()

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        _enter(self, offset, sum(map(len, buffers)))
        super().readv(buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        _enter(self, offset, sum(map(len, buffers)))
        super().writev(buffers, offset, durable=durable)

    def discard(self, offset: int, length: int) -> None:
        _enter(self, offset, length)
        super().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        _enter(self, offset, length)
        super().write_zeroes(offset, length, unmap=unmap)


class BusyMemory(MemoryBackend):
    """The same of a disk in memory."""

    on_io: Callable[[], None] = staticmethod(lambda: None)
    bad: frozenset[int] = frozenset()

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        _enter(self, offset, sum(map(len, buffers)))
        super().readv(buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        _enter(self, offset, sum(map(len, buffers)))
        super().writev(buffers, offset, durable=durable)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        _enter(self, offset, length)
        super().write_zeroes(offset, length, unmap=unmap)
