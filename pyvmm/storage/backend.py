"""The protocol every kind of disk speaks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from pyvmm.startup.types import Protocol

SECTOR_SIZE = 512
"""Bytes; the unit a disk's size is rounded down to."""
_ZERO_CHUNK = 1 << 20


class BlockBackend(Protocol):
    """A disk: ``size_bytes`` bytes that can be read, written and flushed.

    Transfers are all or nothing for the caller: they return when every byte is done, or raise
    OSError, and nothing else.  Callers keep them within ``size_bytes``; one outside it raises
    OSError and touches nothing.  One thread at a time, but for ``hurry``.
    """

    @property
    def size_bytes(self) -> int:
        """The disk's size; a multiple of 512."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused (EROFS)."""

    @property
    def block_size(self) -> int:
        """The logical block in bytes: a power of 2 from 512."""

    @property
    def can_discard(self) -> bool:
        """Whether ``discard`` has a chance to free anything."""

    @property
    def can_write_zeroes(self) -> bool:
        """Whether ``write_zeroes`` works without the zeroes being transferred."""

    @property
    def extra_calls(self) -> int:
        """How many calls, of the host or a server, it has made in all beyond one a transfer."""

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill ``buffers``, in order, from ``offset`` (bytes)."""

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """Store ``buffers``, in order, at ``offset`` (bytes).

        Volatile until a flush; with ``durable`` on stable storage when it returns.
        """

    def flush(self) -> None:
        """Return when everything done before is on stable storage.

        After one failure every later flush, and durable write, fails too: the host may have
        dropped what it could not write, and a second attempt would report as safe what is lost.
        """

    def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed any more; what they read as is undefined.  May do nothing."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the bytes zero; with ``unmap`` their room may be freed.  Volatile like a write."""

    def refresh_size(self) -> int:
        """Look again how large the disk is, adopt that as ``size_bytes`` and return it."""

    def hurry(self, until_s: float) -> None:
        """Let no wait of ours last beyond ``until_s`` (time.monotonic), those under way included.

        What is not done by then fails.  From any thread, and from a signal handler.  A wait in
        the kernel, for a dead disk or NFS server, is none of ours.
        """

    def close(self) -> None:
        """Free what it holds; idempotent.  Does not flush."""


class OutsideError(OSError):
    """The caller asked for what is not on the disk; the host was not asked."""


class HostErrors:
    """Says what the host refuses a disk, once for each operation and error's text.

    The guest learns only that a request failed; why, the person at the host has to mend.
    """

    def __init__(self, name: str, report: Callable[[str], None]) -> None:
        self._name = name
        self._report = report
        self._said: set[tuple[str, str]] = set()

    def say(self, operation: str, error: OSError) -> None:
        """``operation`` ("a write") has failed with ``error``."""
        # By number, a file that became shorter would be the same as a bad disk: EIO.
        kind = operation, error.strerror or str(error)
        if isinstance(error, OutsideError) or kind in self._said:
            return
        self._said.add(kind)
        self._report(
            f"{self._name}: {operation} failed: {kind[1]}; the guest gets I/O errors (said once)"
        )


def check_range(name: str, offset: int, length: int, size_bytes: int) -> None:
    """OutsideError (EINVAL) naming the disk unless ``length`` bytes at ``offset`` lie on it."""
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise OutsideError(errno.EINVAL, f"{length} bytes at {offset} leave the disk", name)


def read_only_error(name: str) -> OSError:
    """What a write to a read-only disk raises."""
    return OSError(errno.EROFS, os.strerror(errno.EROFS), name)


def buffers_behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """``buffers`` without their first ``count`` bytes."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


def buffers_slice(buffers: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """The ``length`` bytes of ``buffers`` from ``start``, as views of them."""
    rest = []
    for buffer in buffers:
        if length == 0:
            break
        if start < len(buffer):
            part = buffer[start : start + length]
            rest.append(part)
            length -= len(part)
        start = max(0, start - len(buffer))
    return rest


class BufferCursor:
    """Takes ``buffers`` in pieces, from front to back.

    Each buffer is looked at once, however many pieces there are.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._rest = iter(buffers)
        self._buffer = memoryview(b"")
        self._start = 0

    def take(self, length: int) -> list[memoryview]:
        """The next ``length`` bytes, which there must be, as views."""
        parts = []
        while length:
            if self._start == len(self._buffer):
                self._buffer, self._start = next(self._rest), 0
            part = self._buffer[self._start : self._start + length]
            parts.append(part)
            self._start += len(part)
            length -= len(part)
        return parts


def write_real_zeroes(disk: BlockBackend, offset: int, length: int) -> None:
    """Zeroes written as data, for a disk that knows no better way."""
    chunk = memoryview(bytes(min(length, _ZERO_CHUNK)))
    while length:
        count = min(length, len(chunk))
        disk.writev([chunk[:count]], offset)
        offset += count
        length -= count
