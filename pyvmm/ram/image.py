"""RAM images: content of all RAM that never changes, in files and memfds."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Sequence

from pyvmm.errors import HostError, SnapshotError
from pyvmm.memory import PAGE_SIZE, RamLayer
from pyvmm.ram.runs import MOST_RUNS, Run
from pyvmm.storage.files import set_lock

MOST_LAYERS = 8
_RUNS_IN_MEMORY = 256  # of all layers: a hundred clones fit into one process
_FEW_RUNS = 32
_KEEP_LENGTH = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_SEALS = _KEEP_LENGTH | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class RamImage:
    """The content of ``size_bytes`` of RAM; reading and mapping is safe from many threads.

    It cannot change under a mapping, which would change a clone, or be a SIGBUS.  A memfd is
    sealed.  A file has a shared lock and its exact length, and nobody but its owner may write it.

    ``share`` returns another handle.  The files are closed with the last handle.
    """

    is_immutable = True

    def __init__(self, size_bytes: int, files: Sequence[tuple[_File, tuple[Run, ...] | None]]):
        """Take over one use of each file."""
        self.size_bytes = size_bytes
        self._files = tuple(files)
        self._layers = tuple(RamLayer(file.fd, runs) for file, runs in files)
        self._lock = threading.Lock()
        self._is_closed = False

    @classmethod
    def open_file(cls, path: str, size_bytes: int) -> RamImage:
        """Return the image that the file ``path`` holds whole; SnapshotError."""
        return cls(size_bytes, [(_File(_open(path, size_bytes)), None)])

    @classmethod
    def from_memfd(cls, fd: int, size_bytes: int, runs: Sequence[Run] | None = None) -> RamImage:
        """Seal the memfd ``fd`` and return the image that it holds whole; owns ``fd``.  OSError."""
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return cls(size_bytes, [(_File(fd), None if runs is None else tuple(runs))])

    def over(self, path: str, runs: Sequence[Run]) -> RamImage:
        """Return this image with ``runs`` from the file ``path``; SnapshotError."""
        self._check_diff(path, runs)
        return self._with(_File(_open(path, self.size_bytes)), runs)

    def over_memfd(self, fd: int, runs: Sequence[Run]) -> RamImage:
        """Return this image with ``runs`` from the memfd ``fd``, sealed now; owns ``fd``.

        OSError, SnapshotError; ``fd`` remains the caller's then.
        """
        self._check_diff("a snapshot in memory", runs)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return self._with(_File(fd), runs)

    @property
    def layers(self) -> tuple[RamLayer, ...]:
        """The files, each over those before it; ValueError if this handle is closed."""
        if self._is_closed:
            raise ValueError("the RAM image is closed")
        return self._layers

    @property
    def room(self) -> int:
        """The runs that a layer in memory over this image may have; 0 if there is to be none."""
        if not self.is_immutable or len(self._files) >= MOST_LAYERS:
            return 0
        left = _RUNS_IN_MEMORY - sum(len(runs or ()) for _, runs in self._files)
        return left if left >= _FEW_RUNS else 0

    def share(self) -> RamImage:
        """Return another handle of this image; ValueError if this one is closed."""
        return type(self)(self.size_bytes, self._used_again())

    def close(self) -> None:
        """Give up this handle; idempotent.  Mappings stay."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        for file, _ in self._files:
            file.release()

    def __enter__(self) -> RamImage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _used_again(self) -> Sequence[tuple[_File, tuple[Run, ...] | None]]:
        with self._lock:
            if self._is_closed:
                raise ValueError("the RAM image is closed")
            for file, _ in self._files:
                file.use()
        return self._files

    def _with(self, file: _File, runs: Sequence[Run]) -> RamImage:
        return RamImage(self.size_bytes, [*self._used_again(), (file, tuple(runs))])

    def _check_diff(self, name: str, runs: Sequence[Run]) -> None:
        """Raise SnapshotError unless ``runs`` can be a layer over this image."""
        if len(self._files) >= MOST_LAYERS:
            raise SnapshotError(name, f"its chain is longer than {MOST_LAYERS} snapshots")
        if len(runs) > MOST_RUNS:
            raise SnapshotError(name, f"{len(runs)} runs of RAM; at most {MOST_RUNS}")
        end = 0
        for offset, length in runs:
            bad = offset % PAGE_SIZE or length % PAGE_SIZE or length <= 0 or offset < end
            end = offset + length
            if bad or end > self.size_bytes:
                raise SnapshotError(name, f"the run of RAM {offset:#x}+{length:#x} cannot be")


class JournalImage(RamImage):
    """A memfd that its owner, a journal, changes while the guest is quiesced."""

    is_immutable = False

    @classmethod
    def empty(cls, size_bytes: int) -> JournalImage:
        """Return an image of zeroes; HostError."""
        fd = new_memfd(size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _KEEP_LENGTH | fcntl.F_SEAL_SEAL)
        return cls(size_bytes, [(_File(fd), None)])

    @property
    def fd(self) -> int:
        """The memfd."""
        return self.layers[0].fd


def new_memfd(size_bytes: int) -> int:
    """Return a memfd of ``size_bytes``, all zero, that can be sealed; HostError."""
    try:
        fd = os.memfd_create("pyvmm-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise HostError(f"cannot make an image of RAM in memory: {error}") from error
    os.ftruncate(fd, size_bytes)
    return fd


class _File:
    """A descriptor that is closed with its last use; begins with one."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._uses = 1
        self._lock = threading.Lock()

    def use(self) -> None:
        with self._lock:
            self._uses += 1

    def release(self) -> None:
        with self._lock:
            self._uses -= 1
            is_last = not self._uses
        if is_last:
            os.close(self.fd)


def _open(path: str, size_bytes: int) -> int:
    """Return a descriptor of ``path``, locked against writers; SnapshotError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except OSError as error:
        problem = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise SnapshotError(path, f"{problem}") from error
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise SnapshotError(path, "is not a regular file")
        if facts.st_size != size_bytes:
            raise SnapshotError(path, f"has {facts.st_size} bytes, not {size_bytes} as the RAM")
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SnapshotError(path, "others may write it, under a running guest; chmod 0400")
        _lock(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: str) -> None:
    try:
        set_lock(fd, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise SnapshotError(path, "is locked by a process that writes it") from error
        # A file system without locks: the mode and the user's care must do.
