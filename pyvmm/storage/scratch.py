"""Room for what guests write to private disks: files without a name, cut into stripes.

A stripe has room for every block of a disk, so a block's place is its own offset.  Nearly all of it
stays a hole.  All layers of a machine's disk are stripes of one file, so that a hundred checkpoints
cost one descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable

from pyvmm.storage.raw import RawBackend

MAX_FILE_BYTES = 1 << 40
"""A file gets no further stripe beyond this length; ext4 ends at 16 TiB."""
# A file system without files that never had a name, and a kernel that does not know the flag.
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS})


def snapshot_directory() -> str:
    """Return the directory of a snapshot's file without a name: TMPDIR, or /var/tmp."""
    return os.environ.get("TMPDIR") or "/var/tmp"  # /tmp is often memory


class ScratchFile:
    """A nameless file in ``snapshot_directory()``; OSError if it cannot be made.

    It is closed when its last stripe is freed.  ``report`` takes a line for each kind of error that
    the host answers.
    """

    def __init__(self, stripe_bytes: int, report: Callable[[str], None]) -> None:
        self._stripe_bytes = stripe_bytes
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._used = 0
        self._closed = False
        directory = snapshot_directory()
        self._store = RawBackend(
            directory,
            report=report,
            called=f"{directory} (a snapshot's writes go there; TMPDIR names another)",
            fd=_open_nameless(directory),
        )

    def take(self) -> Stripe | None:
        """Return a stripe, whose content means nothing; None if the file can have no further one.

        OSError if a file that has none cannot be made long enough.
        """
        with self._lock:
            if self._closed:
                return None
            if self._free:
                offset = self._free.pop()
            else:
                offset = self._store.size_bytes
                end = offset + self._stripe_bytes
                if offset and end > MAX_FILE_BYTES:
                    return None
                try:
                    self._store.extend(end)
                except OSError:
                    if offset:
                        return None
                    self._close()
                    raise
            self._used += 1
        return Stripe(self, self._store, offset)

    def give_back(self, offset: int) -> None:
        """Free the stripe at ``offset``: its owner does not use it any more."""
        with self._lock:
            self._used -= 1
            if self._used:
                self.empty(offset)
                self._free.append(offset)
            else:
                self._close()

    def empty(self, offset: int) -> None:
        """Free the room of the stripe at ``offset``, where the file system can make holes."""
        with contextlib.suppress(OSError):  # reported; the room stays taken
            self._store.discard(offset, self._stripe_bytes)

    def _close(self) -> None:
        self._closed = True
        self._store.close()


class Stripe:
    """``offset`` and the following bytes of ``store``, which belong to one layer."""

    def __init__(self, file: ScratchFile, store: RawBackend, offset: int) -> None:
        self.store = store
        self.offset = offset
        self.file = file

    def empty(self) -> None:
        """Free its room; the stripe stays the owner's."""
        self.file.empty(self.offset)

    def free(self) -> None:
        """Give the stripe back; call it once."""
        self.file.give_back(self.offset)


def take_stripe(
    file: ScratchFile | None, stripe_bytes: int, report: Callable[[str], None]
) -> Stripe:
    """Return a stripe of ``file``, or of a new file if there is none or it is full; OSError."""
    stripe = None if file is None else file.take()
    if stripe is None:
        stripe = ScratchFile(stripe_bytes, report).take()
    assert stripe is not None  # a new file has room for one
    return stripe


def _open_nameless(directory: str) -> int:
    """Return a descriptor of a new file without a name."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    path = f"{directory}/pyvmm-{os.getpid()}-{os.urandom(8).hex()}.snapshot"
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    return fd
