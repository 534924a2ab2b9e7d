"""A disk in a file or on a host block device, byte for byte."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence

from pyvmm.storage.backend import (
    SECTOR_SIZE,
    HostErrors,
    buffers_behind,
    check_range,
    read_only_error,
    write_real_zeroes,
)
from pyvmm.storage.files import (
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    check_disk,
    disk_length,
    fallocate,
    lock_disk,
    logical_block_size,
    open_disk,
)

_IOV_MAX = os.sysconf("SC_IOV_MAX")
# Errors of fallocate that cannot do it: the file system, a device, an odd alignment.
_CANNOT_ALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


class RawBackend:
    """The bytes of ``path``, a regular file or a block device (or a symlink to one).

    Opening raises ConfigError, naming the file and the remedy, if it cannot be a disk.  The file is
    locked while it is open: exclusively, or shared with other readers if ``read_only``.  ``report``
    takes a line about an oddity that is no reason to refuse, and one for each kind of error that
    the host answers later.  These lines call the file ``called``, or by its path.

    ``fd``, if given, is a descriptor of it, which is locked already or needs no lock; the disk
    owns it from now on.  Any number of threads may read at once, beside one that writes.

    Writes never make the file grow, not even one that somebody has truncated meanwhile: beyond its
    end they are EIO, as reads are.  CPython itself retries interrupted system calls (PEP 475).
    """

    extra_calls = 0
    merges = True

    def __init__(
        self, path: str, *, read_only: bool = False, report: Callable[[str], None],
        called: str = "", fd: int | None = None,
    ) -> None:
        self.path = self.absolute_path = path
        self.read_only = read_only
        self.can_discard = self.can_write_zeroes = not read_only
        self.size_bytes = 0
        self._report = report
        self._errors = HostErrors(called or path, report)
        self._flush_errno = 0
        self._closed = False
        self._fd = open_disk(path, read_only) if fd is None else fd
        try:
            if fd is None:
                self.absolute_path = os.path.abspath(path)  # this process may change its directory
                check_disk(self._fd, path)
                lock_disk(self._fd, path, read_only, report)
            self.block_size = logical_block_size(self._fd)
            self._may_shrink = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self.refresh_size()
        except BaseException:
            self.close()
            raise

    def duplicate_for_reading(self) -> RawBackend:
        """Return the same file as a read-only disk of its own; both hold the file's lock.

        The lock lasts until the last of them is closed.
        """
        disk = RawBackend(
            self.path, read_only=True, report=lambda line: None,
            fd=fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 0),
        )
        disk.absolute_path = self.absolute_path
        # Lines that were said are not said again.
        disk._report, disk._errors = self._report, self._errors
        disk.size_bytes = self.size_bytes
        return disk

    def fileno(self) -> int:
        """Return the file's descriptor, which stays this disk's."""
        return self._fd

    def extend(self, length: int) -> None:
        """Make the file ``length`` bytes long, for an owner that uses it as a store; OSError."""
        os.ftruncate(self._fd, length)
        self.size_bytes = length

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``.  EIO if the file ends early."""
        try:
            if len(buffers) == 1:  # nearly always; and nearly always one call transfers all of it
                length = len(buffers[0])
                if (
                    0 <= offset <= self.size_bytes - length
                    and os.preadv(self._fd, buffers, offset) == length
                ):
                    return
            self._transfer(os.preadv, buffers, offset)
        except OSError as error:
            self._errors.say("a read", error)
            raise

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``."""
        if self.read_only:
            raise read_only_error(self.path)
        if not durable:
            try:
                if len(buffers) == 1:  # as in readv
                    length = len(buffers[0])
                    if (
                        0 <= offset <= self.size_bytes - length
                        and (
                            not self._may_shrink
                            or os.lseek(self._fd, 0, os.SEEK_END) >= offset + length
                        )
                        and os.pwritev(self._fd, buffers, offset) == length
                    ):
                        return
                self._check_end("a write", offset, sum(map(len, buffers)))
                self._transfer(os.pwritev, buffers, offset)
            except OSError as error:
                self._errors.say("a write", error)
                raise
            return
        self._check_latch()
        self._check_end("a write", offset, sum(map(len, buffers)))
        try:
            self._transfer(_pwritev_dsync, buffers, offset)
        except OSError as error:
            # Perhaps only the sync failed.  The kernel would not report that again at the next one.
            self._latch(error)
            self._errors.say("a write", error)
            raise

    def flush(self) -> None:
        """See ``BlockBackend.flush``."""
        self._check_latch()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._latch(error)
            self._errors.say("a flush", error)
            raise

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockBackend.discard``: a hole in the file, if the file system makes holes."""
        self._deallocate("a discard", PUNCH_HOLE, offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``: with ``unmap`` a hole, else a zeroed range that keeps
        its room.  If the file system can do neither, zeroes are written."""
        mode = PUNCH_HOLE if unmap else ZERO_RANGE
        if not self._deallocate("zeroing", mode, offset, length):
            write_real_zeroes(self, offset, length)

    def refresh_size(self) -> int:
        """See ``BlockBackend.refresh_size``."""
        length = disk_length(self._fd)
        tail = length % SECTOR_SIZE
        if length - tail == self.size_bytes:
            return self.size_bytes
        self.size_bytes = length - tail
        if tail:
            self._report(
                f"{self.path}: its last {tail} bytes are no whole {SECTOR_SIZE}-byte sector; "
                "the guest does not see them"
            )
        return self.size_bytes

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``: nothing here waits."""

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
        """Repeat ``call`` until every byte of ``buffers`` is transferred."""
        missing = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if not 0 <= offset <= self.size_bytes - missing:
            check_range(self.path, offset, missing, self.size_bytes)
        while missing:
            many = len(buffers) > _IOV_MAX
            done = call(self._fd, buffers[:_IOV_MAX] if many else buffers, offset)
            if done == missing:
                return
            if not done:
                raise self._shorter()
            missing -= done
            offset += done
            buffers = buffers_behind(buffers, done)

    def _deallocate(self, operation: str, mode: int, offset: int, length: int) -> bool:
        """Call fallocate in ``mode``, which leaves zeroes; False if that cannot be done here."""
        if self.read_only:
            raise read_only_error(self.path)
        self._check_end(operation, offset, length)
        if length:
            try:
                fallocate(self._fd, mode | KEEP_SIZE, offset, length)
            except OSError as error:
                if error.errno not in _CANNOT_ALLOCATE:
                    self._errors.say(operation, error)
                    raise
                return False
        return True

    def _check_end(self, operation: str, offset: int, length: int) -> None:
        """Raise, and report, OSError unless these bytes are in the disk and now in the file."""
        check_range(self.path, offset, length, self.size_bytes)
        if self._may_shrink and length and os.lseek(self._fd, 0, os.SEEK_END) < offset + length:
            # Two error objects: one that is also a local would make a cycle that keeps the buffers.
            self._errors.say(operation, self._shorter())
            raise self._shorter()

    def _shorter(self) -> OSError:
        return OSError(errno.EIO, "the file has become shorter", self.path)

    def _check_latch(self) -> None:
        if self._flush_errno:
            raise OSError(self._flush_errno, "an earlier flush failed", self.path)

    def _latch(self, error: OSError) -> None:
        self._flush_errno = error.errno or errno.EIO


def _pwritev_dsync(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    return os.pwritev(fd, buffers, offset, os.RWF_DSYNC)
