"""Opening, measuring and locking the files that disks are made of."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable

from pyvmm.errors import ConfigError
from pyvmm.storage.backend import SECTOR_SIZE

# struct flock { short l_type; short l_whence; off_t l_start; off_t l_len; pid_t l_pid; }
_FLOCK = struct.Struct("hhqqi4x")
# The errors of file systems without locks.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
# The errors of copy_file_range if it is not known, or not between these files.
_CANNOT_COPY = frozenset(
    {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
)
_COPY_CHUNK = 1 << 20

# linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

# linux/fs.h
_BLKSSZGET = 0x1268  # _IO(0x12, 104): logical sector size, into an int

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate  # the os module has none with a mode
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), again if interrupted; OSError with the kernel's errno."""
    while _fallocate(fd, mode, offset, length):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def open_disk(path: str, read_only: bool) -> int:
    """Return a descriptor of ``path``; ConfigError with the remedy if it cannot be opened."""
    # O_NONBLOCK: opening a FIFO must not wait for its other end; disks ignore it.
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        return os.open(path, flags | (os.O_RDONLY if read_only else os.O_RDWR))
    except ValueError as error:
        raise ConfigError(repr(path), f"is no file name: {error}") from error
    except OSError as error:
        raise ConfigError(path, _open_problem(path, read_only, error)) from error


def _open_problem(path: str, read_only: bool, error: OSError) -> str:
    """Return the words for ``error`` that tell the user what to do."""
    if error.errno == errno.ENOENT:
        return "no such file; an empty disk is made with: truncate -s 1G FILE"
    if error.errno == errno.EISDIR:
        return _NOT_A_DISK.format("a directory")
    if error.errno == errno.ENXIO and _is_socket(path):
        return (
            "is a socket; the disk of a vhost-user back end that listens on it is "
            f"--disk vhost-user={path}"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and not read_only:
        if os.access(path, os.R_OK):
            return "cannot be written; attach it read-only by adding ,ro"
        return "permission denied; give yourself read and write permission"
    return f"cannot be opened: {error.strerror}"


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


_NOT_A_DISK = "is {}, not a regular file or a block device"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}


def disk_length(fd: int) -> int:
    """Return the length in bytes of a file, or of a block device, whose length fstat lacks."""
    return os.lseek(fd, 0, os.SEEK_END)


def check_disk(fd: int, path: str) -> None:
    """Raise ConfigError unless ``fd`` is a file or a block device of at least one sector."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ConfigError(path, _NOT_A_DISK.format(_KINDS.get(stat.S_IFMT(mode), "special")))
    length = disk_length(fd)
    if length < SECTOR_SIZE:
        from pyvmm.storage.image_kinds import kind_of_head  # nearly every disk is long enough

        kind = kind_of_head(os.pread(fd, SECTOR_SIZE, 0))
        what = "" if kind is None else f"; it is {kind.name} ({kind.remedy(path)})"
        raise ConfigError(
            path, f"has {length} bytes, a disk has at least one sector of {SECTOR_SIZE}{what}"
        )


def logical_block_size(fd: int) -> int:
    """Return the unit in bytes in which the disk must be addressed; a file takes any."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return SECTOR_SIZE
    size = bytearray(4)
    fcntl.ioctl(fd, _BLKSSZGET, size)
    return int.from_bytes(size, "little")


def set_lock(fd: int, kind: int) -> None:
    """Lock the whole file, F_RDLCK or F_WRLCK, for as long as ``fd`` is open; OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))


def lock_disk(fd: int, path: str, read_only: bool, report: Callable[[str], None]) -> None:
    """Lock the whole file for as long as ``fd`` is open.

    The lock belongs to this open of the file, not to the process.  So it conflicts with a second
    --disk of the same run too, and with the locks that QEMU takes.
    """
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    try:
        set_lock(fd, kind)
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


def copy_range(source: int, source_at: int, target: int, target_at: int, length: int) -> None:
    """Copy bytes between descriptors, in the kernel or by sharing blocks where it can; OSError."""
    is_in_kernel = True
    while length:
        done = 0
        if is_in_kernel:
            try:
                done = os.copy_file_range(source, target, length, source_at, target_at)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
        if not done:
            is_in_kernel = False
            data = os.pread(source, min(length, _COPY_CHUNK), source_at)
            if not data:
                raise OSError(errno.EIO, "the file has become shorter")
            done = os.pwrite(target, data, target_at)
        source_at, target_at, length = source_at + done, target_at + done, length - done
