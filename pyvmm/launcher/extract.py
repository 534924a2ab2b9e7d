"""Files of the guest made from a tar stream, never outside their place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from pyvmm.launcher.tar_reader import Kind, Member, TarError, TarReader

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Extractor:
    """Makes the members of a stream below the directory ``place``, the first one as ``name``.

    Each step on the way to a file is opened without following links.  So a link that the guest has
    sent leads nothing outside.  Links whose target is outside the copied tree, and special files,
    are left out: ``report`` is told.  Owners, set-uid bits and the like are not taken over.
    """

    def __init__(self, place: str, name: str, report: Callable[[str], None]) -> None:
        self._place = place
        self._name = os.fsencode(name)
        self._root: tuple[bytes, ...] | None = None
        """The parts of the first member's name, for which ``name`` stands."""
        self._modes: list[tuple[tuple[bytes, ...], int, int]] = []
        self._report = report

    def extract(self, reader: TarReader) -> None:
        """Make all that ``reader`` has; TarError, OSError."""
        for member in reader.members():
            if self._root is None:
                self._root = member.parts
            parts = self._own(member.parts)
            self._make(member, parts, reader)
        if self._root is None:
            raise TarError("an empty stream")
        # Last: a directory that its owner may not write takes its files before.
        for parts, mode, mtime_s in reversed(self._modes):
            with self._directory(parts) as fd:
                os.fchmod(fd, mode)
                os.utime(fd, (mtime_s, mtime_s))

    def _own(self, parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return the place of a member; TarError if it is not below the first one."""
        assert self._root is not None
        if parts[: len(self._root)] != self._root:
            raise TarError(f"{b'/'.join(parts)[:80]!r}, which was not asked for")
        return (self._name, *parts[len(self._root) :])

    def _make(self, member: Member, parts: tuple[bytes, ...], reader: TarReader) -> None:
        *above, name = parts
        with self._directory(tuple(above)) as place:
            match member.kind:
                case Kind.DIRECTORY:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=place)
                    os.close(os.open(name, _DIRECTORY, dir_fd=place))
                    self._modes.append((parts, member.mode & 0o777, member.mtime_s))
                case Kind.FILE:
                    self._clear(name, place)
                    fd = os.open(name, _NEW_FILE, 0o600, dir_fd=place)
                    with open(fd, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor
                        for data in reader.content():
                            file.write(data)
                        os.fchmod(fd, member.mode & 0o777)
                        os.utime(fd, (member.mtime_s, member.mtime_s))
                case Kind.SYMLINK if self._leads_inside(parts, member.link):
                    self._clear(name, place)
                    os.symlink(member.link, name, dir_fd=place)
                case Kind.HARDLINK:
                    self._link(member, name, place)
                case _:
                    shown = b"/".join(member.parts).decode("utf-8", "backslashreplace")
                    why = "leads outside what is copied" if member.kind is Kind.SYMLINK else (
                        "is not copied"
                    )
                    self._report(f"get: {shown} is left out: a {member.kind} that {why}")

    def _link(self, member: Member, name: bytes, place: int) -> None:
        parts = tuple(part for part in member.link.split(b"/") if part not in (b"", b"."))
        if b".." in parts:
            raise TarError(f"a link that leads elsewhere: {member.link[:80]!r}")
        *above, other = self._own(parts)
        self._clear(name, place)
        with self._directory(tuple(above)) as source:
            os.link(other, name, src_dir_fd=source, dst_dir_fd=place, follow_symlinks=False)

    def _leads_inside(self, parts: tuple[bytes, ...], link: bytes) -> bool:
        """True if ``link``, at ``parts``, cannot lead outside the first member."""
        if link.startswith(b"/") or not link:
            return False
        depth = len(parts) - 1  # directories between the first member, inclusive, and the link
        for part in link.split(b"/"):
            depth += -1 if part == b".." else part not in (b"", b".")
            if depth < 1:
                return False
        return True

    @staticmethod
    def _clear(name: bytes, place: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=place)

    @contextlib.contextmanager
    def _directory(self, parts: tuple[bytes, ...]) -> Iterator[int]:
        """Open the directory of ``parts``, step by step, without following links."""
        fd = os.open(self._place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts:
                inner = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)
