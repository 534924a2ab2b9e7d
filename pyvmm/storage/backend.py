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

    A transfer returns when every byte is done, or raises OSError and nothing else.  Callers keep
    it within ``size_bytes``; one outside raises OSError and touches nothing.  Only one thread at a
    time may call a disk, except for ``hurry``.
    """

    @property
    def size_bytes(self) -> int:
        """The disk's size; a multiple of 512."""

    @property
    def read_only(self) -> bool:
        """True if writes are refused (EROFS)."""

    @property
    def block_size(self) -> int:
        """The logical block in bytes: a power of 2 from 512."""

    @property
    def can_discard(self) -> bool:
        """True if ``discard`` has a chance to free anything."""

    @property
    def can_write_zeroes(self) -> bool:
        """True if ``write_zeroes`` works without transferring the zeroes."""

    @property
    def merges(self) -> bool:
        """True if one transfer of neighbouring requests costs less than one for each."""

    @property
    def extra_calls(self) -> int:
        """The number of calls to the host or a server so far, beyond one for each transfer."""

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

        After one failure every later flush and durable write fails too.  The host may have dropped
        the data that it could not write: a second attempt would report lost data as safe.
        """

    def discard(self, offset: int, length: int) -> None:
        """Declare the bytes unneeded.  They may then read as anything.  May do nothing."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the bytes zero; with ``unmap`` their room may be freed.  Volatile like a write."""

    def refresh_size(self) -> int:
        """Look again how large the disk is, set ``size_bytes`` to that and return it."""

    def hurry(self, until_s: float) -> None:
        """Let no wait of the disk last beyond ``until_s`` (time.monotonic), current ones included.

        A request that is not done by then fails.  Callable from any thread, and from a signal
        handler.  A wait in the kernel, for a dead disk or an NFS server, cannot be cut short.
        """

    def close(self) -> None:
        """Free what it holds; idempotent.  Does not flush."""


class OutsideError(OSError):
    """The caller asked for bytes that are not on the disk; the host was not asked."""


class HostErrors:
    """Reports errors of the host on a disk, once for each operation and error text.

    The guest learns only that a request failed; the person at the host has to mend the cause.
    """

    def __init__(self, name: str, report: Callable[[str], None]) -> None:
        self._name = name
        self._report = report
        self._said: set[tuple[str, str]] = set()

    def say(self, operation: str, error: OSError) -> None:
        """Report that ``operation`` ("a write") has failed with ``error``."""
        # Not by number: a file that became shorter would then look like a bad disk, both EIO.
        kind = operation, error.strerror or str(error)
        if isinstance(error, OutsideError) or kind in self._said:
            return
        self._said.add(kind)
        self._report(
            f"{self._name}: {operation} failed: {kind[1]}; the guest gets I/O errors (said once)"
        )


def check_range(name: str, offset: int, length: int, size_bytes: int) -> None:
    """Raise OutsideError (EINVAL), naming the disk, unless the bytes lie on it."""
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise OutsideError(errno.EINVAL, f"{length} bytes at {offset} leave the disk", name)


def read_only_error(name: str) -> OSError:
    """Return the error that a write to a read-only disk raises."""
    return OSError(errno.EROFS, os.strerror(errno.EROFS), name)


def buffers_behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return ``buffers`` without their first ``count`` bytes."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


def buffers_slice(buffers: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """Return the ``length`` bytes of ``buffers`` from ``start``, as views of them."""
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
        """Return views of the next ``length`` bytes; the caller knows that so many are left."""
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
    """Write zeroes as data, for a disk that knows no better way."""
    chunk = memoryview(bytes(min(length, _ZERO_CHUNK)))
    while length:
        count = min(length, len(chunk))
        disk.writev([chunk[:count]], offset)
        offset += count
        length -= count
