"""The protocol every kind of disk speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

SECTOR_SIZE = 512
"""Bytes; the unit a disk's size is rounded down to."""


class BlockBackend(Protocol):
    """A disk: ``size_bytes`` bytes that can be read, written and flushed.

    Transfers are all or nothing for the caller: they return when every byte is done, or raise
    OSError.  Callers keep them within ``size_bytes``; one outside it raises OSError and touches
    nothing.  One thread at a time.
    """

    @property
    def size_bytes(self) -> int:
        """The disk's size; a multiple of 512."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    @property
    def block_size(self) -> int:
        """The unit the storage likes to be addressed in, in bytes: a power of 2 from 512."""

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill ``buffers``, in order, from ``offset`` (bytes)."""

    def writev(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Store ``buffers``, in order, at ``offset`` (bytes).  Volatile until a flush."""

    def flush(self) -> None:
        """Return when everything written before is on stable storage.

        After one failure every later flush fails too: the host may have dropped what it could
        not write, and a second attempt would report as safe what is lost.
        """

    def close(self) -> None:
        """Free what it holds; idempotent.  Does not flush."""
