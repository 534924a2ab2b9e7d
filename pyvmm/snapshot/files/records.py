"""The file ``state``: records of plain data, each with a version and a CRC.

The header is char magic[8]; le16 format; le16 records; le32 file_bytes; le32 crc32, of all before
it.  A record is u8 name_bytes; u8 zero; le16 version; le32 payload_bytes; name; payload; le32
crc32.  A record's CRC goes on from the CRC before it, so records of two files cannot be mixed.

A payload is one value: a letter for its type, then its content.  There is no pickle, because a
pickle runs code, and no json, because json has no bytes and its import takes 3 ms.
docs/snapshot-format.md has the table.  A file may hold anything: each length is compared with what
is left, and sizes, values and depth have limits.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping

from pyvmm.errors import SnapshotError

MAGIC = b"pyvmmsnp"
FORMAT = 1
MAX_STATE_BYTES = 16 << 20
MAX_RECORDS = 64
MAX_VALUES = 1 << 17
"""Values and keys in one file: more than ten times those of a machine with eight vCPUs."""
MAX_NAME_BYTES = 32
MAX_DEPTH = 24
MAX_INTEGER_BYTES = 32
_HEADER = struct.Struct("<8sHHI")
_RECORD = struct.Struct("<BBHI")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_MIN_I64, _MAX_I64 = -(1 << 63), (1 << 63) - 1


def encode(
    state: Mapping[str, object], *, name: str, versions: Mapping[str, int] | None = None
) -> bytes:
    """Return the content of the file ``state``, with one record for each key of ``state``.

    ``name`` is the file's, for SnapshotError if ``state`` is over a limit.  ``versions`` has the
    versions of records; it is 1 of others.  TypeError for anything but plain data with text keys.
    """
    versions = versions or {}
    if len(state) > MAX_RECORDS:
        raise SnapshotError(name, f"would have {len(state)} records, the limit is {MAX_RECORDS}")
    budget = _Budget()
    pieces = []
    for key, value in state.items():
        payload = bytearray()
        try:
            _put(payload, value, 0, budget)
        except _TooMuchError as error:
            raise SnapshotError(name, f"record {key!r} would have {error}") from None
        except TypeError as error:
            raise TypeError(f"record {key!r}: {error}") from None
        raw = key.encode("ascii")
        if not key.isidentifier() or len(raw) > MAX_NAME_BYTES:
            raise ValueError(f"{key!r} is no name of a record")
        pieces.append(_RECORD.pack(len(raw), 0, versions.get(key, 1), len(payload)) + raw + payload)
    total = _HEADER.size + 4 + sum(len(piece) + 4 for piece in pieces)
    if total > MAX_STATE_BYTES:
        raise SnapshotError(name, f"would have {total} bytes, the limit is {MAX_STATE_BYTES}")
    out = bytearray(_HEADER.pack(MAGIC, FORMAT, len(pieces), total))
    crc = zlib.crc32(out)
    out += _U32.pack(crc)
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        out += piece
        out += _U32.pack(crc)
    return bytes(out)


def decode(
    data: bytes, *, name: str, versions: Mapping[str, int] | None = None
) -> dict[str, object]:
    """Return the records in ``data``, the content of the file ``name``; SnapshotError.

    With ``versions`` a record that it lacks, or a later version of one, is refused as made by a
    later pyvmm.
    """
    count, crc = _check_header(data, name)
    found: dict[str, object] = {}
    at, end = _HEADER.size + 4, len(data)
    budget = _Budget()
    for _ in range(count):
        if end - at < _RECORD.size:
            raise SnapshotError(name, f"is damaged: it ends inside record {len(found)}")
        name_bytes, zero, version, length = _RECORD.unpack_from(data, at)
        start = at + _RECORD.size + name_bytes
        stop = start + length
        if stop + 4 > end:
            raise SnapshotError(name, f"is damaged: record {len(found)} is longer than the file")
        crc = zlib.crc32(memoryview(data)[at:stop], crc)
        if _U32.unpack_from(data, stop)[0] != crc:
            raise SnapshotError(name, f"is damaged: the CRC of record {len(found)} is wrong")
        key = data[at + _RECORD.size : start].decode("ascii", "replace")
        if zero or key in found or name_bytes > MAX_NAME_BYTES or not key.isidentifier():
            raise SnapshotError(name, f"is damaged: record {len(found)} has a bad head")
        if versions is not None and version > versions.get(key, 0):
            raise SnapshotError(
                name, f"was made by a later pyvmm: record {key!r} has version {version}, this "
                f"pyvmm knows {versions.get(key) or 'no such record'}",
            )
        reader = _Reader(data, start, stop, budget)
        try:
            value = reader.value(0)
            if reader.at != stop:
                raise _DamagedError(f"{stop - reader.at} bytes behind its value")
        except (_DamagedError, _TooMuchError) as error:
            raise SnapshotError(name, f"is damaged: record {key!r} has {error}") from None
        found[key] = value
        at = stop + 4
    if at != end:
        raise SnapshotError(name, f"is damaged: {end - at} bytes behind the last record")
    return found


def _check_header(data: bytes, name: str) -> tuple[int, int]:
    """Return the number of records and the header's CRC."""
    if data[: len(MAGIC)] != MAGIC:
        raise SnapshotError(name, "is no state of a snapshot")
    if len(data) < _HEADER.size + 4:
        raise SnapshotError(name, f"is cut off: it has {len(data)} bytes of {_HEADER.size + 4}")
    _, format_version, count, length = _HEADER.unpack_from(data)
    (crc,) = _U32.unpack_from(data, _HEADER.size)
    if crc != zlib.crc32(data[: _HEADER.size]):
        raise SnapshotError(name, "is damaged: the CRC of its header is wrong")
    if format_version != FORMAT:
        raise SnapshotError(
            name, f"was made by {'a later' if format_version > FORMAT else 'another'} pyvmm: its "
            f"format is {format_version}, this pyvmm knows {FORMAT}",
        )
    if length != len(data):
        what = "cut off" if length > len(data) else "too long"
        raise SnapshotError(name, f"is {what}: it has {len(data)} bytes of {length}")
    if count > MAX_RECORDS:
        raise SnapshotError(name, f"has {count} records, the limit is {MAX_RECORDS}")
    return count, crc


class _DamagedError(Exception):
    """The payload is no value; the text goes on behind "record has"."""


class _TooMuchError(Exception):
    """A limit is passed; the text goes on behind "record has"."""


class _Budget:
    """The values that are left of MAX_VALUES."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MAX_VALUES

    def take(self, count: int) -> None:
        """Count ``count`` values."""
        self.left -= count
        if self.left < 0:
            raise _TooMuchError(f"too many values: the limit of all records is {MAX_VALUES}")


def _put(out: bytearray, value: object, depth: int, budget: _Budget) -> None:
    """Append ``value``."""
    if depth > MAX_DEPTH:
        raise _TooMuchError(f"values more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None:
        out += b"n"
    elif value is True:
        out += b"t"
    elif value is False:
        out += b"f"
    elif isinstance(value, int) and kind is int:
        if _MIN_I64 <= value <= _MAX_I64:
            out += b"i"
            out += _I64.pack(value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(raw) > MAX_INTEGER_BYTES:
                raise _TooMuchError(f"an integer of more than {MAX_INTEGER_BYTES} bytes")
            out += b"j"
            out.append(len(raw))
            out += raw
    elif isinstance(value, str) and kind is str:
        _put_bytes(out, b"s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes) and kind is bytes:
        _put_bytes(out, b"b", value)
    elif isinstance(value, list) and kind is list:
        budget.take(len(value))
        out += b"l"
        out += _U32.pack(len(value))
        for item in value:
            _put(out, item, depth + 1, budget)
    elif isinstance(value, dict) and kind is dict:
        budget.take(2 * len(value))
        out += b"d"
        out += _U32.pack(len(value))
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{key!r} is no text key")
            _put_bytes(out, b"", key.encode("utf-8", "surrogatepass"))
            _put(out, item, depth + 1, budget)
    else:
        raise TypeError(f"{kind.__name__} is no plain data")


def _put_bytes(out: bytearray, letter: bytes, raw: bytes) -> None:
    if len(raw) > MAX_STATE_BYTES:
        raise _TooMuchError(f"a value of {len(raw)} bytes, the limit is {MAX_STATE_BYTES}")
    out += letter
    out += _U32.pack(len(raw))
    out += raw


class _Reader:
    """Reads the value at ``at`` of ``data``, which ends before ``end``."""

    __slots__ = ("_budget", "_data", "_end", "at")

    def __init__(self, data: bytes, at: int, end: int, budget: _Budget) -> None:
        self._data = data
        self._end = end
        self._budget = budget
        self.at = at

    def value(self, depth: int) -> object:
        """Return the value, and move behind it."""
        if depth > MAX_DEPTH:
            raise _TooMuchError(f"values more than {MAX_DEPTH} deep")
        at = self.at
        letter = self._data[at : at + 1]
        if letter == b"i" and at + 9 <= self._end:  # most values
            self.at = at + 9
            value: int = _I64.unpack_from(self._data, at + 1)[0]
            return value
        self._skip(9 if letter == b"i" else 1)
        read = _READERS.get(letter)
        if read is not None:
            return read(self, depth)
        if letter in _CONSTANTS:
            return _CONSTANTS[letter]
        raise _DamagedError(f"a value of no known type ({letter!r})")

    def text(self, _depth: int = 0) -> str:
        """Return a text without its letter."""
        try:
            return self.octets(0).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise _DamagedError("a text that is no UTF-8") from None

    def octets(self, _depth: int) -> bytes:
        """Return bytes without their letter."""
        count = self._count()  # are there
        at = self.at
        self.at = stop = at + count
        return self._data[at:stop]

    def integer(self, _depth: int) -> int:
        """Return a long integer without its letter."""
        at = self.at
        self._skip(1)
        count = self._data[at]
        if count > MAX_INTEGER_BYTES:
            raise _TooMuchError(f"an integer of more than {MAX_INTEGER_BYTES} bytes")
        self._skip(count)
        return int.from_bytes(self._data[at + 1 : self.at], "little", signed=True)

    def items(self, depth: int) -> list[object]:
        """Return a list without its letter."""
        count = self._count()
        self._budget.take(count)
        return [self.value(depth + 1) for _ in range(count)]

    def mapping(self, depth: int) -> dict[str, object]:
        """Return a dict without its letter."""
        count = self._count()
        self._budget.take(2 * count)
        found: dict[str, object] = {}
        for _ in range(count):
            key = self.text()
            found[key] = self.value(depth + 1)
        if len(found) != count:
            raise _DamagedError("a key twice")
        return found

    def _count(self) -> int:
        """Return a length, or a number of items, each of which takes at least a byte."""
        at = self.at
        self._skip(4)
        value: int = _U32.unpack_from(self._data, at)[0]
        if value > self._end - self.at:
            raise _DamagedError(f"a length of {value} with {self._end - self.at} bytes left")
        return value

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > self._end:
            raise _DamagedError("a value that is cut off")


_CONSTANTS: Mapping[bytes, object] = {b"n": None, b"t": True, b"f": False}
_READERS: Mapping[bytes, Callable[[_Reader, int], object]] = {
    b"j": _Reader.integer, b"s": _Reader.text, b"b": _Reader.octets,
    b"l": _Reader.items, b"d": _Reader.mapping,
}
