"""A tar stream that nobody vouches for, read with bounded memory.

Only the formats of the agent (ustar, with GNU's long names and large sizes) are read.  Python's
``tarfile`` would take as much memory as the guest says that a name has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyvmm.errors import PyvmmError
from pyvmm.startup.types import Record, StrEnum

BLOCK = 512
MAX_NAME_BYTES = 4096
_CHUNK = 256 << 10


class TarError(PyvmmError):
    """The stream is not what the agent sends."""


class Kind(StrEnum):
    """Kinds of members."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    OTHER = "special file"


_KINDS = {
    b"0": Kind.FILE, b"\0": Kind.FILE, b"7": Kind.FILE, b"5": Kind.DIRECTORY, b"2": Kind.SYMLINK,
    b"1": Kind.HARDLINK, b"3": Kind.OTHER, b"4": Kind.OTHER, b"6": Kind.OTHER,
}


class Member(Record):
    """One member; ``parts`` of its name are none of "", "." and ".."."""

    kind: Kind
    parts: tuple[bytes, ...]
    link: bytes
    mode: int
    mtime_s: int
    size: int


class TarReader:
    """Reads members from ``read``, which returns up to as many bytes as it is asked for."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._left = 0
        """Bytes of the present member, with its padding, that were not read."""
        self._content = 0

    def members(self) -> Iterator[Member]:
        """Yield each member; ``content`` may be read before the next.  TarError."""
        names: dict[bytes, bytes] = {}
        while True:
            self._skip()
            header = self._exactly(BLOCK, "a header")
            if not any(header):
                self._drain()
                return
            kind, size = header[156:157], self._start(header)
            if kind in (b"L", b"K"):
                if size > MAX_NAME_BYTES + 1:
                    raise TarError(f"a name of {size} bytes; the limit is {MAX_NAME_BYTES}")
                names[kind] = self._exactly(self._left, "a name")[:size].rstrip(b"\0")
                self._left = 0
                continue
            yield self._member(kind, size, header, names)
            names = {}

    def content(self) -> Iterator[bytes]:
        """Yield the bytes of the present member, a file."""
        while self._content:
            data = self._some(min(self._content, _CHUNK))
            self._content -= len(data)
            yield data

    def _start(self, header: bytes) -> int:
        """Return the size of the member that ``header`` begins, if its checksum is right."""
        sums = sum(header[:148]) + 8 * 32 + sum(header[156:])
        if _number(header[148:156]) != sums:
            raise TarError("a header with a wrong checksum")
        size = _number(header[124:136])
        self._left = -(-size // BLOCK) * BLOCK
        self._content = 0
        return size

    def _member(
        self, letter: bytes, size: int, header: bytes, names: dict[bytes, bytes]
    ) -> Member:
        kind = _KINDS.get(letter)
        if kind is None:
            raise TarError(f"a member of type {letter!r}")
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
            name = prefix + b"/" + name
        name = names.get(b"L", name)
        parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
        if b".." in parts or b"\0" in name:
            raise TarError(f"a name that leads elsewhere: {name[:80]!r}")
        if kind is Kind.FILE:
            self._content = size
        elif kind is not Kind.HARDLINK and size:
            raise TarError(f"a {kind} with content")
        return Member(
            kind=kind, parts=parts, link=names.get(b"K", header[157:257].split(b"\0")[0]),
            mode=_number(header[100:108]) & 0o7777, mtime_s=min(_number(header[136:148]), 1 << 40),
            size=size,
        )

    def _skip(self) -> None:
        while self._left:
            self._some(min(self._left, _CHUNK))

    def _drain(self) -> None:
        """Read what follows the end, which is zeros, as tar pads."""
        while self._read(_CHUNK):
            pass

    def _some(self, count: int) -> bytes:
        data = self._read(count)
        if not data:
            raise TarError("the stream ends in a member")
        self._left -= len(data)
        return data

    def _exactly(self, count: int, what: str) -> bytes:
        found = bytearray()
        while len(found) < count:
            data = self._read(count - len(found))
            if not data:
                raise TarError(f"the stream ends in {what}")
            found += data
        return bytes(found)


def _number(field: bytes) -> int:
    """Return the number in a field: octal digits, or GNU's binary form; TarError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarError(f"a number that is none: {field!r}")
    return int(digits, 8)
