"""A tar stream of the guest, unpacked on this host as it comes; nothing in it is believed.

``tarfile`` reads whole headers into memory, however long they say they are, and its data filter
had holes (CVE-2025-4517).  So only single blocks go through it here.  Every file is made relative
to the descriptor of its directory, and no link of the stream, or of others, is ever followed.
"""

from __future__ import annotations

import contextlib
import math
import os
import tarfile
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from pyvmm.control.packing import TransferError
from pyvmm.report import escape

MAX_MEMBERS = 200_000
MAX_BYTES = 64 << 30
MAX_DEPTH = 200
"""Parts of a name: deeper directories are a trap for programs that recurse, as rmtree does."""
MAX_HEADER_BYTES = 64 << 10
"""Of a long name, or of the attributes of one member."""
MAX_SKIPPED = 100
"""Lines about members that are left out; later ones are dropped."""
_BLOCK = tarfile.BLOCKSIZE
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class Unpacker:
    """Unpacks the stream of ``agent.get`` by the rules of ``cp -r``; a context manager.

    A ``target`` that is a directory, or ends with ``/``, gets the copy under its own name;
    otherwise the copy becomes ``target``.  ``feed`` takes the stream in pieces, ``end`` checks that
    it was complete.  ``skipped`` has a line for each member that is left out: a device, or a link
    that leads out of the copy.

    TransferError for a target that cannot be written, for a stream that is no tar, and for one
    that is over ``max_members`` or ``max_bytes``.
    """

    def __init__(
        self, target: str, *, max_members: int = MAX_MEMBERS, max_bytes: int = MAX_BYTES
    ) -> None:
        self.skipped: list[str] = []
        self.target = target
        is_folder = target.endswith("/") or os.path.isdir(target)
        folder, self._rename = (target, "") if is_folder else os.path.split(target)
        try:
            self._folder_fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(f"{folder or '.'}: {error.strerror}") from error
        self._max_members, self._left_bytes = max_members, max_bytes
        self._members = 0
        self._data = bytearray()
        self._root = ""
        """The first part of every member's name."""
        self._fd = -1
        """The file that is being written; -1 for content that is skipped."""
        self._info: tarfile.TarInfo | None = None
        """The member whose content comes."""
        self._left = self._padding = 0
        """Bytes of its content, and up to the next block, that have not come."""
        self._long: dict[str, str] = {}
        """Attributes that the headers before the next member give it."""
        self._text = bytearray()
        self._made: set[tuple[str, ...]] = set()
        self._times: list[tuple[tuple[str, ...], int, float]] = []
        """Directories, which get their modes and times at the end."""
        self._blank = 0
        self._is_over = False

    def feed(self, data: bytes) -> None:
        """Take the next piece of the stream."""
        self._data += data
        try:
            while self._step():
                pass
        except (OSError, tarfile.TarError) as error:
            raise TransferError(f"{self.target}: {_reason(error)}") from error

    def end(self) -> None:
        """The stream has ended; TransferError if it is not complete."""
        if self._left or self._info is not None or not self._members:
            raise TransferError(f"{self.target}: the guest's stream ends too early")
        for parts, mode, mtime in reversed(self._times):
            with contextlib.suppress(OSError), self._opened(parts[:-1]) as parent_fd:
                os.chmod(parts[-1], mode, dir_fd=parent_fd)
                os.utime(parts[-1], (mtime, mtime), dir_fd=parent_fd, follow_symlinks=False)

    def close(self) -> None:
        """Let go of all descriptors; idempotent."""
        for fd in (self._fd, self._folder_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._folder_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    # The stream

    def _step(self) -> bool:
        """Take one block, or a piece of content; False if more of the stream is needed."""
        if self._is_over:
            self._data.clear()
            return False
        if self._left or self._padding:
            return self._take_content()
        if self._info is not None:
            self._end_content(self._info)
            self._info = None
            return True
        if len(self._data) < _BLOCK:
            return False
        block = bytes(self._data[:_BLOCK])
        del self._data[:_BLOCK]
        if not any(block):
            self._blank += 1
            self._is_over = self._blank == 2
            return True
        self._blank = 0
        self._begin(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
        return True

    def _begin(self, info: tarfile.TarInfo) -> None:
        """Begin a member, or a header that tells of the next one."""
        if info.size < 0:
            raise TransferError(f"{self.target}: the guest's stream has a negative size")
        if info.type in (
            tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
        ):
            if info.size > MAX_HEADER_BYTES:
                raise TransferError(f"{self.target}: the guest's stream has a header of "
                                    f"{info.size} bytes; the limit is {MAX_HEADER_BYTES}")
            self._text.clear()
        else:
            self._members += 1
            if self._members > self._max_members:
                raise TransferError(f"{self.target}: the guest sends more than "
                                    f"{self._max_members} files")
            self._adopt(info)
            if info.type not in _FILES:
                info.size = 0 if info.type in (
                    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE
                ) else info.size
            self._make(info)
        if info.size > self._left_bytes:
            raise TransferError(f"{self.target}: the guest sends more than the limit of bytes")
        self._left_bytes -= info.size
        self._info, self._left, self._padding = info, info.size, -info.size % _BLOCK

    def _adopt(self, info: tarfile.TarInfo) -> None:
        """Give ``info`` what the headers before it said."""
        long, self._long = self._long, {}
        info.name = long.get("path", info.name)
        info.linkname = long.get("linkpath", info.linkname)
        try:
            info.size = int(long.get("size", info.size))
            mtime = float(long.get("mtime", info.mtime))
            info.mtime = min(max(mtime, 0.0), float(1 << 40)) if math.isfinite(mtime) else 0.0
        except ValueError:
            raise TransferError(f"{self.target}: the guest's stream has no number where one "
                                "must be") from None
        if info.size < 0:
            raise TransferError(f"{self.target}: the guest's stream has a negative size")

    def _take_content(self) -> bool:
        if not self._data:
            return False
        if self._left:
            with memoryview(self._data) as view, view[: self._left] as piece:
                count = len(piece)
                if self._info is not None and self._info.type in _FILES:
                    self._write(piece)
                else:
                    self._text += piece[: MAX_HEADER_BYTES - len(self._text)]
            self._left -= count
        else:
            count = min(self._padding, len(self._data))
            self._padding -= count
        del self._data[:count]
        return True

    def _write(self, piece: memoryview) -> None:
        while self._fd >= 0 and piece:
            piece = piece[os.write(self._fd, piece) :]

    def _end_content(self, info: tarfile.TarInfo) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.utime(fd, (info.mtime, info.mtime))
            finally:
                os.close(fd)
        text = bytes(self._text)
        self._text.clear()
        if info.type == tarfile.GNUTYPE_LONGNAME:
            self._long["path"] = text.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif info.type == tarfile.GNUTYPE_LONGLINK:
            self._long["linkpath"] = text.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            self._long |= _attributes(text)

    # Members

    def _make(self, info: tarfile.TarInfo) -> None:
        parts = self._parts(info.name)
        if info.type == tarfile.DIRTYPE:
            if parts:
                with self._opened(parts):
                    self._times.append((parts, info.mode & 0o755 | 0o700, info.mtime))
            return
        if not parts:
            raise TransferError(f"{self.target}: the guest sends no directory")
        if info.type == tarfile.SYMTYPE:
            is_named = self._root != "." or bool(self._rename)
            if not _stays_inside(len(parts) - 1 - is_named, info.linkname):
                self._skip(f"link to {info.linkname} left out: it leads out of the copy", parts)
                return
        elif info.type == tarfile.LNKTYPE:
            if self._parts(info.linkname) not in self._made:
                self._skip("left out: it is a second name of something else", parts)
                return
        elif info.type not in _FILES:
            self._skip("left out: it is a device, a FIFO or of an unknown kind", parts)
            return
        with self._opened(parts[:-1]) as parent_fd:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(parts[-1], dir_fd=parent_fd)
            if info.type == tarfile.SYMTYPE:
                os.symlink(info.linkname, parts[-1], dir_fd=parent_fd)
            elif info.type == tarfile.LNKTYPE:
                first = self._parts(info.linkname)
                with self._opened(first[:-1]) as first_fd:
                    os.link(first[-1], parts[-1], src_dir_fd=first_fd, dst_dir_fd=parent_fd,
                            follow_symlinks=False)
            else:
                self._fd = os.open(parts[-1], _NEW_FILE, info.mode & 0o755 | 0o600,
                                   dir_fd=parent_fd)
                self._made.add(parts)

    def _parts(self, name: str) -> tuple[str, ...]:
        """Return the parts of a member's name, the first of them as the copy is called."""
        words = name.split("/")
        parts = tuple(word for word in words if word not in ("", "."))
        root = "." if words[0] == "." else words[0]
        self._root = self._root or root
        if ".." in parts or "\0" in name or not root or root != self._root:
            raise TransferError(
                f"{self.target}: the guest sends another file: {escape(repr(name[:80]))}"
            )
        if len(parts) > MAX_DEPTH:
            raise TransferError(
                f"{self.target}: the guest sends directories that are more than {MAX_DEPTH} deep"
            )
        if root == ".":  # the guest's root directory
            return (self._rename, *parts) if self._rename else parts
        return (self._rename or root, *parts[1:])

    @contextlib.contextmanager
    def _opened(self, parts: tuple[str, ...]) -> Iterator[int]:
        """Yield a descriptor of the directory ``parts``; missing directories are made."""
        fd = os.dup(self._folder_fd)
        try:
            for part in parts:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
                inner_fd = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner_fd
            yield fd
        finally:
            os.close(fd)

    def _skip(self, why: str, parts: tuple[str, ...]) -> None:
        if len(self.skipped) < MAX_SKIPPED:
            self.skipped.append(escape(f"{'/'.join(parts)}: {why}"))


def _stays_inside(depth: int, link: str) -> bool:
    """True if a link in a directory ``depth`` levels below the copy's leads to a part of the copy.

    ``..`` may stand at the beginning only: behind a name, it depends on where that leads.
    """
    words = [word for word in link.split("/") if word not in ("", ".")]
    ups = 0
    while ups < len(words) and words[ups] == "..":
        ups += 1
    is_relative = bool(link) and not link.startswith("/")
    return is_relative and ups <= depth and ".." not in words[ups:] and "\0" not in link


def _attributes(text: bytes) -> dict[str, str]:
    """Return what a PAX header says that we heed; records are ``LENGTH KEY=VALUE\\n``."""
    found: dict[str, str] = {}
    while text:
        digits = text.partition(b" ")[0]
        if not (digits.isdigit() and len(digits) < 8):
            break
        length = int(digits)
        record = text[len(digits) + 1 : length - 1]
        if length <= len(digits) + 1 or length > len(text):
            break
        key, _, value = record.partition(b"=")
        if key in (b"path", b"linkpath", b"size", b"mtime"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        text = text[length:]
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        name = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return escape(f"{name}{error.strerror or error}")
    return f"the guest's stream is no tar: {error}"

