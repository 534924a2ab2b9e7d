"""Files and directories of this host as a tar stream for the guest, piece by piece.

The agent unpacks the stream below a directory (``agent.put``).
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator

from pyvmm.errors import PyvmmError

PIECE_BYTES = 256 << 10
_BLOCK = tarfile.BLOCKSIZE


class TransferError(PyvmmError):
    """A file or directory cannot be copied into the guest or out of it."""


def put_place(source: str, target: str, *, target_is_directory: bool) -> tuple[str, str]:
    """Return the guest's directory and the name in it for a copy of ``source`` to ``target``.

    The rules are those of ``cp -r``: a directory, or a target that ends with ``/``, gets the copy
    under its own name.
    """
    if target_is_directory or target.endswith("/"):
        return target.rstrip("/") or "/", own_name(source)
    folder, _, name = target.rpartition("/")
    return folder or "/", name


def own_name(source: str) -> str:
    """Return the last part of the path ``source``, that of the directory for ``.``."""
    return os.path.basename(os.path.abspath(source)) or "root"


def pack(source: str, name: str, skipped: list[str]) -> Iterator[bytes]:
    """Yield the tar stream of ``source``, under ``name``; a link given as ``source`` is followed.

    Links inside a directory are kept, sockets and devices left out: ``skipped`` gets a line for
    each.  Owner is root.  TransferError, before the first piece, for a source that is not there.
    """
    path = os.path.realpath(source)
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        elif not stat.S_ISDIR(status.st_mode):
            raise TransferError(f"{source}: is neither a file nor a directory")
    except OSError as error:
        raise TransferError(f"{source}: {error.strerror}") from error
    return _stream(path, name, skipped)


def _stream(path: str, name: str, skipped: list[str]) -> Iterator[bytes]:
    yield from _entry(path, name, skipped)
    yield bytes(2 * _BLOCK)


def _entry(path: str, name: str, skipped: list[str]) -> Iterator[bytes]:
    try:
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            children = sorted(os.listdir(path))
            yield _header(name, tarfile.DIRTYPE, status)
        elif kind == stat.S_IFLNK:
            yield _header(name, tarfile.SYMTYPE, status, link=os.readlink(path))
            return
        elif kind == stat.S_IFREG:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                yield from _file(fd, path, name, skipped)
            finally:
                os.close(fd)
            return
        else:
            skipped.append(f"{path}: left out: it is a socket, a FIFO or a device")
            return
    except OSError as error:
        skipped.append(f"{path}: left out: {error.strerror}")
        return
    for child in children:
        yield from _entry(f"{path}/{child}", f"{name}/{child}", skipped)


def _file(fd: int, path: str, name: str, skipped: list[str]) -> Iterator[bytes]:
    status = os.fstat(fd)
    yield _header(name, tarfile.REGTYPE, status, size=status.st_size)
    left = status.st_size
    problem = ""
    while left:
        data = b""
        if not problem:
            try:
                data = os.read(fd, min(left, PIECE_BYTES))
                problem = "" if data else "it became shorter while it was read"
            except OSError as error:
                problem = error.strerror or str(error)
        # The size is in the header: zeros take the place of what cannot be read.
        data = data or bytes(min(left, PIECE_BYTES))
        left -= len(data)
        yield data
    yield bytes(-status.st_size % _BLOCK)
    if problem:
        skipped.append(f"{path}: its copy ends with zeros: {problem}")


def _header(
    name: str, kind: bytes, status: os.stat_result, *, link: str = "", size: int = 0
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    info.mode, info.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
