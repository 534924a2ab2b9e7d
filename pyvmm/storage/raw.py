"""A disk in a file or on a host block device, byte for byte."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Sequence

from pyvmm.errors import ConfigError
from pyvmm.storage.backend import SECTOR_SIZE

_IOV_MAX = os.sysconf("SC_IOV_MAX")
# struct flock { short l_type; short l_whence; off_t l_start; off_t l_len; pid_t l_pid; }
_FLOCK = struct.Struct("hhqqi4x")
# What file systems without locks answer.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class RawBackend:
    """The bytes of ``path``, a regular file or a block device (or a symlink to one).

    Opening raises ConfigError, naming the file and the remedy, if it cannot be a disk.  The file
    is locked while it is open: exclusively, or shared with other readers if ``read_only``.
    ``report`` takes a line about what is odd but no reason to refuse.

    The file never grows.  Interrupted system calls are retried by CPython itself (PEP 475).
    """

    block_size = SECTOR_SIZE

    def __init__(
        self, path: str, *, read_only: bool = False, report: Callable[[str], None]
    ) -> None:
        self.path = path
        self.read_only = read_only
        self._flush_errno = 0
        self._closed = False
        self._fd = _open(path, read_only)
        try:
            length = _disk_length(self._fd, path)
            _lock(self._fd, path, read_only, report)
        except BaseException:
            os.close(self._fd)
            raise
        tail = length % SECTOR_SIZE
        self.size_bytes = length - tail
        if tail:
            report(
                f"{path}: its last {tail} bytes are no whole {SECTOR_SIZE}-byte sector; "
                "the guest does not see them"
            )

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``.  EIO where the file ends early."""
        self._transfer(os.preadv, buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.writev``."""
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.path)
        self._transfer(os.pwritev, buffers, offset)

    def flush(self) -> None:
        """See ``BlockBackend.flush``."""
        if self._flush_errno:
            raise OSError(self._flush_errno, "an earlier flush failed", self.path)
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._flush_errno = error.errno or errno.EIO
            raise

    def close(self) -> None:
        """Close the file, which unlocks it; idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def _transfer(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        buffers: Sequence[memoryview],
        offset: int,
    ) -> None:
        """``call`` until every byte of ``buffers`` is transferred."""
        missing = sum(map(len, buffers))
        if offset < 0 or offset + missing > self.size_bytes:
            raise OSError(errno.EINVAL, f"{missing} bytes at {offset} leave the disk", self.path)
        while missing:
            done = call(self._fd, buffers[:_IOV_MAX], offset)
            if done == missing:
                return
            if not done:
                raise OSError(errno.EIO, "the file has become shorter", self.path)
            missing -= done
            offset += done
            buffers = _behind(buffers, done)


def _behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """``buffers`` without their first ``count`` bytes."""
    rest = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(buffer[count:])
        count = max(0, count - len(buffer))
    return rest


def _open(path: str, read_only: bool) -> int:
    """A descriptor of ``path``; ConfigError with the remedy if it cannot be opened."""
    # O_NONBLOCK: opening a FIFO must not wait for its other end; disks ignore it.
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        return os.open(path, flags | (os.O_RDONLY if read_only else os.O_RDWR))
    except ValueError as error:
        raise ConfigError(repr(path), f"is no file name: {error}") from error
    except OSError as error:
        raise ConfigError(path, _open_problem(path, read_only, error)) from error


def _open_problem(path: str, read_only: bool, error: OSError) -> str:
    """What to tell the user about ``error``."""
    if error.errno == errno.ENOENT:
        return "no such file; an empty disk is made with: truncate -s 1G FILE"
    if error.errno == errno.EISDIR:
        return _NOT_A_DISK.format("a directory")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and not read_only:
        if os.access(path, os.R_OK):
            return "cannot be written; attach it read-only by adding ,ro"
        return "permission denied; give yourself read and write permission"
    return f"cannot be opened: {error.strerror}"


_NOT_A_DISK = "is {}, not a regular file or a block device"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}


def _disk_length(fd: int, path: str) -> int:
    """The length in bytes; ConfigError unless it is a disk of a sector at least."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ConfigError(path, _NOT_A_DISK.format(_KINDS.get(stat.S_IFMT(mode), "special")))
    length = os.lseek(fd, 0, os.SEEK_END)  # fstat has no size of a block device
    if length < SECTOR_SIZE:
        raise ConfigError(
            path, f"has {length} bytes, a disk has at least one sector of {SECTOR_SIZE}"
        )
    return length


def _lock(fd: int, path: str, read_only: bool, report: Callable[[str], None]) -> None:
    """Lock the whole file for as long as ``fd`` is open.

    An open file description lock is this open's, not the process's: it meets a second --disk
    of the same run too, and the locks QEMU takes.
    """
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            remedy = (
                "end the run that writes it"
                if read_only
                else "end the run that uses it, or attach it everywhere with ,ro"
            )
            raise ConfigError(path, f"is locked, so it is in use; {remedy}") from error
        if error.errno not in _NO_LOCKS:
            raise ConfigError(path, f"cannot be locked: {error.strerror}") from error
        report(f"{path}: its file system has no locks; do not attach it twice")
