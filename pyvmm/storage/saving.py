"""Write the layers of a frozen disk to an overlay file, and open such a file as a frozen disk."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator

from pyvmm.errors import ConfigError, SnapshotError
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.bitmap import PAGE_SIZE, BlockBitmap
from pyvmm.storage.files import check_disk, copy_range, lock_disk
from pyvmm.storage.overlay_format import (
    BITMAP_OFFSET,
    check_store,
    data_offset,
    format_store,
    load_page,
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


def open_base(
    location: str, *, size_bytes: int, stamp_ns: int, replaced: bool,
    report: Callable[[str], None],
) -> RawBackend:
    """Return the file ``location``, locked for reading, as the base of a saved disk.

    SnapshotError if it is missing, has another size or, unless ``replaced``, was changed since.
    """
    try:
        base = RawBackend(location, read_only=True, report=report)
    except ConfigError as error:
        if not os.path.exists(location):
            raise SnapshotError(
                location, "is missing: the snapshot's disk is a difference from this file"
            ) from error
        raise SnapshotError(location, error.problem) from error
    problem = ""
    if base.size_bytes != size_bytes:
        what = "has" if replaced else "was changed since the snapshot: it has"
        problem = f"{what} {base.size_bytes} bytes, and the snapshot's disk {size_bytes}"
    elif not replaced and os.fstat(base.fileno()).st_mtime_ns != stamp_ns:
        problem = (
            "was changed since the snapshot was taken (its time of modification differs); if it "
            "is only a copy, name it again: --disk N=FILE"
        )
    if problem:
        base.close()
        raise SnapshotError(location, problem)
    return base


def open_saved_layer(
    path: str, size_bytes: int, report: Callable[[str], None]
) -> tuple[RawBackend, BlockBitmap]:
    """Return the store in the overlay file ``path``, and its bitmap; SnapshotError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SnapshotError(path, f"cannot be opened: {error.strerror}") from error
    try:
        check_disk(fd, path)
        lock_disk(fd, path, True, report)
    except ConfigError as error:
        os.close(fd)
        raise SnapshotError(path, error.problem) from error
    store = RawBackend(path, read_only=True, report=report, fd=fd)
    try:
        check_store(store, size_bytes, path)
    except ConfigError as error:
        store.close()
        raise SnapshotError(path, error.problem) from error
    return store, BlockBitmap(functools.partial(load_page, store))
