"""Messages between a machine and its attendant, as they are sent: one datagram each.

A datagram is u8 kind; u8 number of values; then the values: u8 ``n`` and le64 (a signed integer),
or u8 ``t``, le32 length and text in UTF-8 (with the bytes of a file name that are none).
``attendant.reading`` has the other direction, which most machines have no need of.
"""

from __future__ import annotations

import struct

from pyvmm.startup.types import TYPE_CHECKING, IntEnum

if TYPE_CHECKING:
    Value = int | str

MAX_BYTES = 16 << 10
"""The longest datagram, but for the first one, which comes before the guest runs."""
MAX_BEGIN_BYTES = 160 << 10
"""The longest first datagram: less than a socket's buffer takes (net.core.wmem_default)."""
MAX_VALUES = 255
MAX_DETAIL = 1000
"""Characters of an outcome's detail: more than an explanation looks at."""
INTEGER, LENGTH = struct.Struct("<q"), struct.Struct("<I")
"""A value's eight bytes, and the bytes of a text's length."""


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


BEGIN = 0x42
"""The kind of the first datagram (``attendant.beginning``)."""


def encode(kind: int, *values: Value) -> bytes:
    """Return a datagram; ValueError if it would have too many values."""
    if len(values) > MAX_VALUES:
        raise ValueError(f"{len(values)} values, the limit is {MAX_VALUES}")
    out = bytearray((kind, len(values)))
    for value in values:
        if isinstance(value, str):
            text = value.encode("utf-8", "surrogateescape")
            out += b"t" + LENGTH.pack(len(text)) + text
        else:
            out += b"n" + INTEGER.pack(value)
    return bytes(out)
