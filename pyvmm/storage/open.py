"""Open the disk that the user asked for: find files and servers, stack the layers."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from pyvmm.errors import ConfigError
from pyvmm.startup.types import TYPE_CHECKING, Record
from pyvmm.storage.nbd_uri import is_nbd_uri

if TYPE_CHECKING:
    from pyvmm.storage.backend import BlockBackend

# Each kind of disk is imported only when it is asked for.

_MAX_SCRIPT_BYTES = 1 << 20


class DiskSource(Record):
    """The source and the destination of a disk's bytes.

    ``location`` is a file's path or an NBD URI.  With ``snapshot`` it is never written: writes go
    to the file ``overlay``.  If that is empty, they go to a file that is gone after the run.
    ``faults`` is a script's path (``pyvmm.storage.fault_script``).  With ``is_raw`` the file's
    bytes are the disk even if they look like an image of another format.
    """

    location: str
    read_only: bool = False
    snapshot: bool = False
    overlay: str = ""
    faults: str = ""
    is_raw: bool = False

    @property
    def is_shared(self) -> bool:
        """True if other processes may use ``location`` too, because nothing here writes it."""
        return self.read_only or self.snapshot

    @property
    def files(self) -> tuple[str, ...]:
        """The paths and URIs the disk is made of; some may be empty."""
        return (self.location, self.overlay, self.faults)

    def open(
        self,
        *,
        report: Callable[[str], None],
        until_s: float | None = None,
        made: contextlib.ExitStack | None = None,
    ) -> BlockBackend:
        """See ``open_backend``."""
        return open_backend(self, report=report, until_s=until_s, made=made)

    def __post_init__(self) -> None:
        if self.read_only and self.snapshot:
            raise ConfigError(self.location, "is either read-only or a snapshot, not both")
        if self.overlay and not self.snapshot:
            raise ConfigError(self.location, "has an overlay only as a snapshot")
        if self.overlay and os.path.realpath(self.overlay) == os.path.realpath(self.location):
            raise ConfigError(
                self.location, "overlay= names the disk itself; it must be another file, which "
                "takes what the guest writes"
            )


def open_backend(
    source: DiskSource,
    *,
    report: Callable[[str], None],
    until_s: float | None = None,
    made: contextlib.ExitStack | None = None,
) -> BlockBackend:
    """Return the disk that ``source`` describes, for the caller to close.

    ConfigError names the file, URI or script.  ``report`` takes lines about oddities, now and
    later.  A server has until ``until_s`` (time.monotonic) to agree on a disk.  ``made`` takes
    callbacks that remove the files made here: if the disk was for nothing, close it before the
    backend.
    """
    made = contextlib.ExitStack() if made is None else made
    with contextlib.ExitStack() as stack:
        read_only = source.read_only or source.snapshot
        backend: BlockBackend
        if is_nbd_uri(source.location):
            from pyvmm.storage.nbd import NbdBackend

            backend = NbdBackend(
                source.location, read_only=read_only, report=report, open_until_s=until_s
            )
            is_checked = False  # raw by protocol
        else:
            from pyvmm.storage.raw import RawBackend

            backend = RawBackend(source.location, read_only=read_only, report=report)
            is_checked = not source.is_raw
        stack.callback(backend.close)
        if is_checked:
            _check_format(backend, source.location, report)
        if source.snapshot:
            backend = open_overlay(
                backend, location=source.location, path=source.overlay, stack=stack, report=report,
                made=made,
            )
        if source.faults:
            from pyvmm.storage.fault_script import parse_script
            from pyvmm.storage.faulty import FaultyBackend

            script = _read_script(source.faults)
            backend = FaultyBackend(backend, parse_script(script, source.faults))
        stack.pop_all()
        return backend


def _check_format(backend: BlockBackend, path: str, report: Callable[[str], None]) -> None:
    """Refuse an image of another format; report contents that are unlikely to be a disk."""
    try:
        head, tail = _read(backend, 0, 1024), _read(backend, backend.size_bytes - 512, 512)
    except OSError:
        return  # the guest will see the same error
    # An image of ext4 begins with zeros, and none of the formats does.
    if not any(head[:4]) and not any(tail[:4]):
        return
    from pyvmm.storage.image_kinds import kind_of_head, kind_of_tail

    kind = kind_of_head(head) or kind_of_tail(tail)
    if kind is None:
        return
    if kind.is_likely_raw:
        report(f"{path}: is {kind.name}, attached as the raw bytes it is ({kind.remedy(path)})")
        return
    raise ConfigError(
        path,
        f"is {kind.name}, and a disk must be a raw image; convert it: {kind.remedy(path)} "
        "(to attach these very bytes add ,format=raw)",
    )


def _read(backend: BlockBackend, offset: int, length: int) -> bytes:
    data = bytearray(min(length, backend.size_bytes - offset))
    backend.readv([memoryview(data)], offset)
    return bytes(data)


def open_overlay(
    base: BlockBackend,
    *,
    location: str,
    path: str,
    stack: contextlib.ExitStack,
    report: Callable[[str], None],
    made: contextlib.ExitStack,
) -> BlockBackend:
    """Return ``base``, which is at ``location``, under an overlay in the file ``path``.

    With "" for ``path`` the file has no name and is gone with the overlay.  ``stack`` closes what
    was opened if the caller fails; ``made`` is explained at ``open_backend``.  ConfigError.
    """
    if not path:
        return _open_private(base, location, stack, report)
    from pyvmm.storage.overlay import OverlayBackend
    from pyvmm.storage.overlay_format import format_store, store_bytes
    from pyvmm.storage.raw import RawBackend

    new = _create(path, store_bytes(base.size_bytes))
    # Remove the new file again unless it becomes an overlay.
    remove = contextlib.ExitStack()
    if new is not None:
        remove.callback(new.undo)
    with remove:
        store = RawBackend(path, report=report)
        stack.callback(store.close)
        stamp = _stamp(location)
        try:
            if new is not None:
                format_store(store, base.size_bytes, stamp)
                store.flush()
                _sync_directory(path)
            overlay = OverlayBackend(base, store, name=path, base_stamp=stamp, report=report)
        except OSError as error:
            raise ConfigError(path, f"cannot be made an overlay: {error.strerror}") from error
        made.push(remove.pop_all())
        stack.callback(made.close)
        return overlay


def _open_private(
    base: BlockBackend, location: str, stack: contextlib.ExitStack, report: Callable[[str], None]
) -> BlockBackend:
    """Return ``base`` under a file without a name that takes the writes."""
    from pyvmm.storage.frozen import FrozenDisk
    from pyvmm.storage.private import PrivateDisk
    from pyvmm.storage.scratch import snapshot_directory

    disk = PrivateDisk(FrozenDisk.of_base(base, location, read_only=False), report=report)
    stack.callback(disk.close)
    try:
        disk.make_room()
    except OSError as error:
        directory = snapshot_directory()
        raise ConfigError(
            directory,
            f"no file of {base.size_bytes} bytes can be made there for a snapshot's writes: "
            f"{error.strerror}; set TMPDIR, which is {directory} now, to a directory with room "
            "that you may write",
        ) from error
    return disk


class _NewFile(Record):
    """A file without data at ``path``, to become a store; ``is_ours`` if we created it.

    ``identity`` is its st_dev and st_ino.
    """

    path: str
    identity: tuple[int, int]
    is_ours: bool

    def undo(self) -> None:
        """Remove the file, or truncate it if it was there before.

        Do nothing if another file has its name by now.
        """
        with contextlib.suppress(OSError):
            status = os.lstat(self.path) if self.is_ours else os.stat(self.path)
            if (status.st_dev, status.st_ino) != self.identity:
                return
            if self.is_ours:
                os.unlink(self.path)
            else:
                os.truncate(self.path, 0)


def _create(path: str, length: int) -> _NewFile | None:
    """Make a file of ``length`` bytes without data, or find one; None if it holds data.

    An interrupted run may leave such an empty file behind.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    is_ours = True
    try:
        try:
            fd = os.open(path, flags | os.O_EXCL, 0o600)
        except FileExistsError:
            is_ours = False
            fd = os.open(path, flags, 0o600)
    except ValueError as error:
        raise ConfigError(repr(path), f"is no file name: {error}") from error
    except OSError as error:
        raise ConfigError(path, f"cannot be made: {error.strerror}") from error
    status = os.fstat(fd)
    new = _NewFile(path=path, identity=(status.st_dev, status.st_ino), is_ours=is_ours)
    try:
        if not is_ours and not _is_empty(fd, length):
            return None
        os.ftruncate(fd, length)
    except OSError as error:
        if is_ours:
            new.undo()
        problem = "no room for" if error.errno == errno.ENOSPC else "cannot be made"
        raise ConfigError(path, f"{problem} {length} bytes: {error.strerror}") from error
    finally:
        os.close(fd)
    return new


def _is_empty(fd: int, length: int) -> bool:
    """True if ``fd`` has no byte, or ``length`` of them and all in a hole.

    Its allocated blocks say nothing: some file systems allocate blocks for a file's attributes,
    or before any data.
    """
    size = os.lseek(fd, 0, os.SEEK_END)
    if size != length:
        return size == 0
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO  # "beyond the end of the file": there is no data
    return False


def _sync_directory(path: str) -> None:
    """Make the name ``path`` as stable as the file."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _stamp(location: str) -> int:
    """Return the base file's mtime in ns, to detect a changed base; 0 if it has none (NBD)."""
    if is_nbd_uri(location):
        return 0
    try:
        return os.stat(location).st_mtime_ns
    except OSError:
        return 0  # it is open, but has lost its name


def _read_script(path: str) -> str:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(path, "is not a regular file, as a fault script is")
            script = file.read(_MAX_SCRIPT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(path, f"the fault script cannot be read: {reason}") from error
    if len(script) > _MAX_SCRIPT_BYTES:
        raise ConfigError(path, f"is longer than a script may be, {_MAX_SCRIPT_BYTES} bytes")
    return script.decode("utf-8", "replace")
