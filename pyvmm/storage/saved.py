"""Open what ``saving.py`` wrote: the base of a saved disk, and the layer over it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from pyvmm.errors import ConfigError, SnapshotError
from pyvmm.storage.bitmap import BlockBitmap
from pyvmm.storage.files import check_disk, lock_disk
from pyvmm.storage.raw import RawBackend


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
) -> tuple[RawBackend, int, BlockBitmap]:
    """Return the store in the overlay file ``path``, where in it the data begins, and its bitmap.

    SnapshotError.
    """
    # A disk that nobody has written has no such file.
    from pyvmm.storage.overlay_format import check_store, data_offset, load_page

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
    return store, data_offset(size_bytes), BlockBitmap(functools.partial(load_page, store))
