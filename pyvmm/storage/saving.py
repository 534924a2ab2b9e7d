"""Write the layers of a frozen disk to an overlay file.  ``saved.py`` opens such a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator

from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.bitmap import PAGE_SIZE, BlockBitmap
from pyvmm.storage.files import copy_range
from pyvmm.storage.overlay_format import (
    BITMAP_OFFSET,
    data_offset,
    format_store,
    store_bytes,
)
from pyvmm.storage.raw import RawBackend

_CHUNK = 1 << 20


def copy_blocks(
    source: BlockBackend, source_at: int, target: BlockBackend, target_at: int, length: int
) -> None:
    """Copy bytes of one store to another, where nothing was written yet; OSError.

    Holes stay holes where the file system tells them.
    """
    if isinstance(source, RawBackend) and isinstance(target, RawBackend):
        for start, count in _data_ranges(source.fileno(), source_at, length):
            to = target_at + start - source_at
            copy_range(source.fileno(), start, target.fileno(), to, count)
        return
    chunk = bytearray(min(length, _CHUNK))
    while length:
        view = memoryview(chunk)[: min(length, len(chunk))]
        source.readv([view], source_at)
        target.writev([view], target_at)
        source_at, target_at = source_at + len(view), target_at + len(view)
        length -= len(view)


def _data_ranges(fd: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the parts that are no hole, as far as the file system knows."""
    end = offset + length
    while offset < end:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            stop = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return
            start, stop = offset, end
        start, stop = min(start, end), min(stop, end)
        if start < stop:
            yield start, stop - start
        offset = stop


def write_overlay(
    path: str, size_bytes: int, stamp_ns: int, runs: Iterable[tuple[int, int]],
    copy: Callable[[RawBackend, int, int, int], None],
) -> int:
    """Make the overlay file ``path`` of a disk of ``size_bytes``; return the bytes it holds.

    ``runs`` are the (offset, length) that it holds; ``copy(store, at, offset, length)`` puts these
    bytes of the disk into ``store`` from ``at`` on.  The file is stable when this returns, but for
    its name, and nobody may write it.  OSError, and no file is left.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    store = RawBackend(path, report=_say_nothing, fd=fd)
    try:
        store.extend(store_bytes(size_bytes))
        format_store(store, size_bytes, stamp_ns)
        bitmap, held, data = BlockBitmap(), 0, data_offset(size_bytes)
        for offset, length in runs:
            copy(store, data + offset, offset, length)
            bitmap.hold(offset, length)
            held += length
        for index, page in bitmap.pages.items():
            store.writev([memoryview(page)], BITMAP_OFFSET + index * PAGE_SIZE)
        os.fchmod(fd, 0o400)
        os.fsync(fd)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        store.close()
    return held


def _say_nothing(line: str) -> None:
    """Take a line about an error that is raised as well."""
