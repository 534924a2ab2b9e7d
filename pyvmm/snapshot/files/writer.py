"""Make a snapshot's directory: all of it appears at once, or nothing.

It grows as ``DIR.tmp`` and is renamed when everything is stable, ``state`` last.  Whoever makes one
holds a lock (flock) on ``DIR.tmp`` itself: so a leftover of a process that was killed is told from
a directory in the making, and is taken over.  Nothing here follows a symlink in the directory,
and nothing is overwritten.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Mapping

from pyvmm.errors import SnapshotError
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.records import encode
from pyvmm.snapshot.files.sparse import sparse_crc

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
# The errors of kernels and file systems without renameat2 or its flag, and of those without locks.
_NO_SUCH_RENAME = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 100


class Writer:
    """The directory ``path`` in the making; a context manager, which aborts unless ``finish`` was
    called.

    SnapshotError, naming the directory, if there is such a directory already, or another process
    makes it, or the host refuses.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = layout.absolute(path)
        """The directory that there will be."""
        self.temporary_path = self.path + layout.TEMPORARY
        self._fd = -1
        self._is_finished = False
        self._refuse_existing()
        try:
            self._fd = self._claim()
            self._clear(leftover=True)
        except OSError as error:
            self.abort()
            raise self._failed(error) from error
        except SnapshotError:
            self._release()
            raise

    def create(self, name: str) -> int:
        """Return a descriptor, for reading and writing, of a new file in the directory.

        The caller closes it.  ``name`` is one that a snapshot has ("ram", "disk0.overlay").
        """
        self._check_name(name)
        try:
            return os.open(name, _NEW, 0o600, dir_fd=self._fd)
        except OSError as error:
            raise self._failed(error, name) from error

    def path_of(self, name: str) -> str:
        """Return the path of the file ``name``, for a callee that makes it itself."""
        self._check_name(name)
        return f"{self.temporary_path}/{name}"

    def size_of(self, name: str) -> int:
        """Return the size in bytes of the file ``name``, which is there."""
        self._check_name(name)
        return os.lstat(name, dir_fd=self._fd).st_size

    def failed(self, error: OSError, name: str = layout.RAM) -> SnapshotError:
        """Return what to raise after ``error`` at the file ``name``: it names the final path."""
        return self._failed(error, name)

    def finish(self, state: Mapping[str, object]) -> None:
        """Write ``state``, make everything stable and give the directory its name.

        SnapshotError: nothing is left then.
        """
        name = layout.STATE
        try:
            crcs: dict[str, object] = {}
            for name in sorted(os.listdir(self._fd)):
                if (crc := self._settle(name)) is not None:
                    crcs[name] = crc
            name = layout.STATE
            data = encode(
                {**state, layout.FILES: crcs}, name=f"{self.path}/{name}", versions=layout.RECORDS
            )
            self._write_state(data)
            name = ""
            os.fsync(self._fd)
            self._rename()
        except OSError as error:
            self.abort()
            raise self._failed(error, name) from error
        except BaseException:
            self.abort()
            raise
        self._is_finished = True
        self._release()
        # The directory is whole by now; after a power cut it may have its old name, or none.
        try:
            _sync_directory(os.path.dirname(self.path))
        except OSError as error:
            raise self._failed(error) from error

    def abort(self) -> None:
        """Remove everything that was made; idempotent, and nothing after ``finish``."""
        if self._fd < 0 or self._is_finished:
            return
        with contextlib.suppress(OSError, SnapshotError):
            self._clear(leftover=False)
            if _is_at(self._fd, self.temporary_path):
                os.rmdir(self.temporary_path)
        self._release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.abort()

    # The directory in the making -----------------------------------------------------------------

    def _refuse_existing(self) -> None:
        if self.path.endswith(layout.TEMPORARY):
            raise SnapshotError(
                self.path, f"ends in {layout.TEMPORARY}, as unfinished snapshots do; choose "
                "another name",
            )
        try:
            os.lstat(self.path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        raise SnapshotError(
            self.path, "is there already, and a snapshot is never overwritten; name a directory "
            "that does not exist yet",
        )

    def _claim(self) -> int:
        """Make ``DIR.tmp``, or take over a leftover; return its descriptor, locked."""
        for _ in range(_TRIES):
            is_ours = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.temporary_path, 0o700)
                is_ours = True
            try:
                fd = os.open(self.temporary_path, _DIRECTORY)
            except FileNotFoundError:
                continue  # its maker has just finished, or given up
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise SnapshotError(
                        self.temporary_path, "is in the way, and is no directory; remove it"
                    ) from error
                self._unmake(is_ours)
                raise
            try:
                self._lock(fd, is_ours)
                # Its maker may have finished or given up between our open and our lock.
                if _is_at(fd, self.temporary_path):
                    self._make_private(fd)
                    return fd
            except BaseException as error:
                os.close(fd)
                self._unmake(is_ours and isinstance(error, OSError))
                raise
            os.close(fd)
        raise SnapshotError(self.temporary_path, "others make and remove it all the time")

    def _unmake(self, is_ours: bool) -> None:
        """Remove the empty directory that we have just made, if we have."""
        if is_ours:
            with contextlib.suppress(OSError):
                os.rmdir(self.temporary_path)

    def _lock(self, fd: int, is_ours: bool) -> None:
        """Lock the directory ``fd``, which we made or found; SnapshotError."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnapshotError(
                self.path, f"another process makes this snapshot ({self.temporary_path} is "
                "locked); wait for it, or name another directory",
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not is_ours:
                raise SnapshotError(
                    self.temporary_path, "is in the way, and its file system has no locks; remove "
                    "it if no pyvmm writes it",
                ) from error

    def _make_private(self, fd: int) -> None:
        """Keep others out of the directory ``fd``; SnapshotError if it is another user's."""
        if os.fstat(fd).st_uid != os.geteuid():
            raise SnapshotError(
                self.temporary_path, "is in the way, and belongs to another user; name another "
                "directory",
            )
        os.fchmod(fd, 0o700)

    def _clear(self, *, leftover: bool) -> None:
        """Remove the files of a snapshot.  With ``leftover`` SnapshotError if there are others."""
        names = os.listdir(self._fd)
        for name in names:
            mode = os.lstat(name, dir_fd=self._fd).st_mode
            if leftover and not (layout.is_file_name(name) and stat.S_ISREG(mode)):
                raise SnapshotError(
                    self.temporary_path, f"is in the way: it holds {name!r}, which no unfinished "
                    "snapshot has; remove it, or name another directory",
                )
        for name in names:
            os.unlink(name, dir_fd=self._fd)

    def _settle(self, name: str) -> int | None:
        """Make the file ``name`` stable and read-only; return its CRC, None for RAM's."""
        self._check_name(name)
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                     dir_fd=self._fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SnapshotError(f"{self.path}/{name}", "is no regular file")
            os.fchmod(fd, 0o400)
            os.fsync(fd)
            return None if name == layout.RAM else sparse_crc(fd)
        finally:
            os.close(fd)

    def _write_state(self, data: bytes) -> None:
        fd = os.open(layout.STATE, _NEW, 0o600, dir_fd=self._fd)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fchmod(fd, 0o400)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _rename(self) -> None:
        try:
            rename_new(self.temporary_path, self.path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise SnapshotError(
                    self.path, "was made by somebody else meanwhile, and is not overwritten"
                ) from error
            raise

    def _check_name(self, name: str) -> None:
        if not layout.is_file_name(name):
            raise SnapshotError(f"{self.path}/{name}", "is no file of a snapshot")

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _failed(self, error: OSError | ValueError, name: str = "") -> SnapshotError:
        subject = f"{self.path}/{name}" if name else self.path
        if isinstance(error, ValueError):
            return SnapshotError(repr(subject), f"is no file name: {error}")
        return SnapshotError(subject, f"cannot be written: {error.strerror}")


def rename_new(source: str, target: str) -> None:
    """Rename ``source``, a directory, to ``target``; FileExistsError if that is there.

    Without renameat2 there is a gap in which an empty directory at ``target`` would be replaced.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)  # glibc 2.28, musl 1.2.6
    if renameat2 is not None:
        old, new = os.fsencode(source), os.fsencode(target)
        if not renameat2(_AT_FDCWD, old, _AT_FDCWD, new, ctypes.c_uint(_RENAME_NOREPLACE)):
            return
        error = ctypes.get_errno()
        if error not in _NO_SUCH_RENAME:
            raise OSError(error, os.strerror(error), source)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    os.rename(source, target)


def _is_at(fd: int, path: str) -> bool:
    """True if ``fd`` is the directory at ``path``."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
