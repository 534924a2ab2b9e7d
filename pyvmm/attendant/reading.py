"""Messages between a machine and its attendant, as they are read: with everything checked.

An attendant reads what a process sends that may have been taken over.  So a value has one of two
types, a length is compared with what is left, and ``SHAPES`` has the types of each request.
"""

from __future__ import annotations

from pyvmm.attendant.messages import INTEGER, LENGTH, MAX_BYTES, Ask
from pyvmm.startup.types import TYPE_CHECKING, IntEnum

if TYPE_CHECKING:
    from typing import Final

    from pyvmm.attendant.messages import Value

MAX_TEXT = 4096
"""Characters of one text in a request or an answer."""
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


class Answer(IntEnum):
    """Answers: DONE has the values that the request is for, some with a descriptor besides;
    REFUSED has the subject and the problem of a SnapshotError, FAILED an errno."""

    DONE = 1
    REFUSED = 2
    FAILED = 3


def decode(data: bytes, *, most_bytes: int = MAX_BYTES) -> tuple[int, tuple[Value, ...]]:
    """Return the kind and the values of a datagram; ValueError says why it is none."""
    if not 2 <= len(data) <= most_bytes:
        raise ValueError(f"{len(data)} bytes, the limit is {most_bytes}")
    kind, count, at = data[0], data[1], 2
    values: list[Value] = []
    for _ in range(count):
        sort, at = data[at : at + 1], at + 1
        form = LENGTH if sort == b"t" else INTEGER
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
