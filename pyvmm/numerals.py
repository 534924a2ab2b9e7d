"""Numbers in texts that people and files give: each has a form and a limit.

``int`` and ``float`` take much that nobody means ("1_0", "٣", " 7 ", "inf", "nan").  They also
refuse numbers of over 4300 digits with an error of their own.  These functions read the decimal
numbers of options and files: nothing may stand around one, and no sign in front.
"""

from __future__ import annotations

_MAX_CHARACTERS = 40
SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE_LETTERS = "BIKMGTbikmgt"
_DECIMAL = frozenset("0123456789.eE+-")


def whole_number(text: str, lowest: int, highest: int) -> int | None:
    """Return ``text``, only ASCII digits, as a number; None unless it is one in the range."""
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_CHARACTERS):
        return None
    number = int(text)
    return number if lowest <= number <= highest else None


def decimal_number(text: str, lowest: float, highest: float) -> float | None:
    """Return ``text``, as ``2.5``, ``.5``, ``2.`` or ``1e3``, as a number; None unless it is one in
    the range.  It has no sign but its exponent's."""
    is_signed = text.startswith(("+", "-"))
    if is_signed or len(text) > _MAX_CHARACTERS or not _DECIMAL.issuperset(text):
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if lowest <= number <= highest else None


def size_in_bytes(text: str, highest: int) -> int | None:
    """Return ``256M``, ``1GiB`` or ``1048576`` in bytes; None unless a size up to ``highest``."""
    digits = text.rstrip(_SIZE_LETTERS)
    suffix = text[len(digits) :].upper()
    unit = suffix.removesuffix("IB" if len(suffix) > 2 else "B")
    if unit not in SIZE_UNITS:
        return None
    count = whole_number(digits, 0, highest // SIZE_UNITS[unit])
    return None if count is None else count * SIZE_UNITS[unit]


def shown(text: str) -> str:
    """Return ``text`` as a message quotes it: not longer than a number that is meant."""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."
