"""AML, the byte code of ACPI's definition blocks: one function for each term that pyvmm emits.

Every function returns the bytes of one term, so nesting calls nests terms::

    scope("\\_SB", device("COM1", name("_HID", eisa_id("PNP0501"))))

ACPI 6.5, chapter 20 "ACPI Machine Language (AML) Specification"; ``resources.py`` has the
resource descriptors that go into a buffer.  Bad arguments are programming errors: ValueError.
"""

from __future__ import annotations

_LETTERS, _DIGITS, _HEX = (
    frozenset(characters)
    for characters in ("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", "0123456789", "0123456789ABCDEF")
)
_EISA_LETTERS = range(ord("@"), ord("_") + 1)  # the values of five bits; only A-Z are used
_SEGMENT_LENGTH = 4
_MAX_COUNT = 0xFF
_MAX_ARGUMENTS = 7
_MAX_SYNC_LEVEL = 15
_ALL_ONES = (1 << 64) - 1

# 20.2.2 Name Objects Encoding
_NULL_NAME = b"\x00"
_DUAL_NAME_PREFIX = b"\x2e"
_MULTI_NAME_PREFIX = b"\x2f"

# 20.2.3 Data Objects Encoding
_ZERO_OP, _ONE_OP, _ONES_OP = b"\x00", b"\x01", b"\xff"
_INTEGER_PREFIXES = ((1, b"\x0a"), (2, b"\x0b"), (4, b"\x0c"), (8, b"\x0e"))
_DWORD_PREFIX = b"\x0c"
_STRING_PREFIX = b"\x0d"

# 20.2.5 Term Objects Encoding
_NAME_OP = b"\x08"
_SCOPE_OP = b"\x10"
_BUFFER_OP = b"\x11"
_PACKAGE_OP = b"\x12"
_METHOD_OP = b"\x14"
_DEVICE_OP = b"\x5b\x82"
_NOTIFY_OP = b"\x86"
_LEQUAL_OP = b"\x93"
_IF_OP = b"\xa0"
_RETURN_OP = b"\xa4"

# 20.2.6.1 Arg Objects Encoding
FIRST_ARGUMENT = b"\x68"
"""Arg0 of the method."""


def package_length(content_bytes: int) -> bytes:
    """Return 20.2.4 Package Length Encoding of ``content_bytes`` and of the encoding's own bytes.

    Up to 63 it is one byte.  Longer lengths have four bits in the first byte, whose top two bits
    count the bytes that follow, at most three: ValueError from 256 MiB on.
    """
    if content_bytes + 1 < 1 << 6:
        return bytes([content_bytes + 1])
    for following in (1, 2, 3):
        length = content_bytes + 1 + following
        if length < 1 << (4 + 8 * following):
            lead = following << 6 | length & 0xF
            return bytes([lead]) + (length >> 4).to_bytes(following, "little")
    raise ValueError(f"an AML package of {content_bytes} bytes is too long")


def _is_segment(text: str) -> bool:
    """True for one to four of A-Z, 0-9 and ``_``, and no digit first."""
    return (
        1 <= len(text) <= _SEGMENT_LENGTH
        and text[0] in _LETTERS
        and (_LETTERS | _DIGITS).issuperset(text)
    )


def path(text: str) -> bytes:
    r"""Return a NameString: ``COM1``, ``\_SB.COM1``, ``^^COM1``; ``\`` is the root.

    Segments have one to four of A-Z, 0-9 and ``_``, and no digit first.
    """
    segments = text.lstrip("^") if text.startswith("^") else text.removeprefix("\\")
    prefix = text[: len(text) - len(segments)]
    parts = segments.split(".") if segments else []
    if not text or len(parts) > _MAX_COUNT or not all(map(_is_segment, parts)):
        raise ValueError(f"{text!r} is not an ACPI path")
    names = b"".join(part.ljust(_SEGMENT_LENGTH, "_").encode("ascii") for part in parts)
    match len(parts):
        case 0:
            lead = _NULL_NAME
        case 1:
            lead = b""
        case 2:
            lead = _DUAL_NAME_PREFIX
        case count:
            lead = _MULTI_NAME_PREFIX + bytes([count])
    return prefix.encode("ascii") + lead + names


def integer(value: int) -> bytes:
    """Return ``value``, 0 to 2**64 - 1, in as few bytes as there are."""
    if value in (0, 1):
        return _ONE_OP if value else _ZERO_OP
    if value == _ALL_ONES:
        return _ONES_OP
    for size, prefix in _INTEGER_PREFIXES:
        if 0 <= value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"{value} is not an AML integer of 64 bits")


def string(text: str) -> bytes:
    """Return a String; ASCII without NUL."""
    if not text.isascii() or "\0" in text:
        raise ValueError(f"{text!a} is not an AML string: only ASCII without NUL is")
    return _STRING_PREFIX + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Return the integer that stands for ``PNP0501``: ACPI 6.5, 19.6.37 EISAID.

    The three letters take five bits each and the digits four, the most significant byte first.
    """
    letters, digits = text[:3], text[3:]
    if (
        len(letters) != 3 or len(digits) != 4 or not _HEX.issuperset(digits)
        or any(ord(letter) not in _EISA_LETTERS for letter in letters)
    ):
        raise ValueError(f"{text!r} is not an EISA ID such as PNP0501")
    compressed = 0
    for letter in letters:
        compressed = compressed << 5 | ord(letter) - ord("@")
    return _DWORD_PREFIX + (compressed << 16 | int(digits, 16)).to_bytes(4, "big")


def buffer(data: bytes) -> bytes:
    """A Buffer of just ``data``."""
    return _packaged(_BUFFER_OP, integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    """A Package of at most 255 terms."""
    if len(elements) > _MAX_COUNT:
        raise ValueError(f"a Package has at most {_MAX_COUNT} elements, not {len(elements)}")
    return _packaged(_PACKAGE_OP, bytes([len(elements)]) + b"".join(elements))


def name(where: str, value: bytes) -> bytes:
    """An object at path ``where`` with the constant ``value``."""
    return _NAME_OP + path(where) + value


def scope(where: str, *terms: bytes) -> bytes:
    """``terms`` inside the existing object at path ``where``."""
    return _packaged(_SCOPE_OP, path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """A Device at path ``where``; ``terms`` are its objects."""
    return _packaged(_DEVICE_OP, path(where) + b"".join(terms))


def method(where: str, *terms: bytes, arguments: int = 0, sync_level: int | None = 0) -> bytes:
    """A Method of ``arguments`` arguments (0 to 7) that runs ``terms``.

    It is serialised at ``sync_level``, 0 to 15: one that creates named objects must not be entered
    twice at a time.  None leaves it unserialised.
    """
    if not 0 <= arguments <= _MAX_ARGUMENTS:
        raise ValueError(f"a Method has 0 to {_MAX_ARGUMENTS} arguments, not {arguments}")
    if sync_level is not None and not 0 <= sync_level <= _MAX_SYNC_LEVEL:
        raise ValueError(f"a Method's sync level is 0 to {_MAX_SYNC_LEVEL}, not {sync_level}")
    serialized = 0 if sync_level is None else 1 << 3 | sync_level << 4
    flags = bytes([arguments | serialized])
    return _packaged(_METHOD_OP, path(where) + flags + b"".join(terms))


def return_(value: bytes) -> bytes:
    """End the method with ``value``."""
    return _RETURN_OP + value


def if_equal(left: bytes, right: bytes, *terms: bytes) -> bytes:
    """Run ``terms`` if the values ``left`` and ``right`` are equal."""
    return _packaged(_IF_OP, _LEQUAL_OP + left + right + b"".join(terms))


def notify(where: str, value: int) -> bytes:
    """Tell the driver of the device at path ``where`` of the event ``value``: 5.6.6."""
    return _NOTIFY_OP + path(where) + integer(value)


def _packaged(opcode: bytes, content: bytes) -> bytes:
    return opcode + package_length(len(content)) + content
