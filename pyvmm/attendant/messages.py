"""Messages between a machine and its attendant: one datagram each, with everything checked.

A datagram is u8 kind; u8 number of values; then the values: u8 ``n`` and le64 (a signed integer),
or u8 ``t``, le32 length and text in UTF-8 (with the bytes of a file name that are none).  An
attendant reads what a process sends that may have been taken over: so a value has one of two types,
a length is compared with what is left, and ``SHAPES`` has the types of each request.
"""

from __future__ import annotations

import struct

from pyvmm.startup.types import TYPE_CHECKING, IntEnum

if TYPE_CHECKING:
    from typing import Final

    Value = int | str

MAX_BYTES = 16 << 10
"""The longest datagram, but for the first one, which comes before the guest runs."""
MAX_BEGIN_BYTES = 160 << 10
"""The longest first datagram: less than a socket's buffer takes (net.core.wmem_default)."""
MAX_VALUES = 255
MAX_TEXT = 4096
"""Characters of one text in a request or an answer."""
MAX_DETAIL = 1000
"""Characters of an outcome's detail: more than an explanation looks at."""
_INTEGER, _LENGTH = struct.Struct("<q"), struct.Struct("<I")


class Ask(IntEnum):
    """Requests.  Those from CREATE on go over the channel of one snapshot's writer."""

    SCRATCH = 1
    SNAPSHOT = 2
    ENDED = 3
    END = 4
    CREATE = 5
    REOPEN = 6
    SIZE = 7
    SETTLE = 8
    PUBLISH = 9
    ABORT = 10


SHAPES: Final[dict[int, tuple[type, ...]]] = {
    Ask.SCRATCH: (),
    Ask.SNAPSHOT: (str,),  # the directory
    # The kind of outcome, its detail; the evidence: has printed, waits for root, reached init.
    Ask.ENDED: (str, str, int, int, int),
    Ask.END: (),
    Ask.CREATE: (str,),  # the name of a file
    Ask.REOPEN: (str,),
    Ask.SIZE: (str,),
    Ask.SETTLE: (),
    Ask.PUBLISH: (),
    Ask.ABORT: (),
}
BEGIN = 0x42
"""The kind of the first datagram (``attendant.beginning``)."""


class Answer(IntEnum):
    """Answers: DONE has the values that the request is for, some with a descriptor besides;
    REFUSED has the subject and the problem of a SnapshotError, FAILED an errno."""

    DONE = 1
    REFUSED = 2
    FAILED = 3


def encode(kind: int, *values: Value) -> bytes:
    """Return a datagram; ValueError if it would have too many values."""
    if len(values) > MAX_VALUES:
        raise ValueError(f"{len(values)} values, the limit is {MAX_VALUES}")
    out = bytearray((kind, len(values)))
    for value in values:
        if isinstance(value, str):
            text = value.encode("utf-8", "surrogateescape")
            out += b"t" + _LENGTH.pack(len(text)) + text
        else:
            out += b"n" + _INTEGER.pack(value)
    return bytes(out)


def decode(data: bytes, *, most_bytes: int = MAX_BYTES) -> tuple[int, tuple[Value, ...]]:
    """Return the kind and the values of a datagram; ValueError says why it is none."""
    if not 2 <= len(data) <= most_bytes:
        raise ValueError(f"{len(data)} bytes, the limit is {most_bytes}")
    kind, count, at = data[0], data[1], 2
    values: list[Value] = []
    for _ in range(count):
        sort, at = data[at : at + 1], at + 1
        form = _LENGTH if sort == b"t" else _INTEGER
        if sort not in (b"t", b"n") or len(data) - at < form.size:
            raise ValueError("a value is cut off, or of no known type")
        (number,), at = form.unpack_from(data, at), at + form.size
        if sort == b"n":
            values.append(number)
            continue
        if len(data) - at < number:
            raise ValueError("a text is longer than its datagram")
        values.append(data[at : at + number].decode("utf-8", "surrogateescape"))
        at += number
    if at != len(data):
        raise ValueError("bytes behind the last value")
    return kind, tuple(values)


def check(values: tuple[Value, ...], shape: tuple[type, ...]) -> tuple[Value, ...]:
    """Return ``values`` if their types are ``shape``, and no text is too long; ValueError."""
    if tuple(map(type, values)) != shape:
        raise ValueError("the values are not those of such a message")
    if any(isinstance(value, str) and len(value) > MAX_TEXT for value in values):
        raise ValueError(f"a text of over {MAX_TEXT} characters")
    return values
