"""Decisions out of bytes: how a target makes a structured case of what a fuzzer mutates.

Every decision uses up some bytes, so a changed byte changes one decision, and the same bytes are
the same case again.  Once they are used up every number is the lowest, and ``more`` is False.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """Reads decisions from ``data``, from its beginning on."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """True while there are bytes left."""
        return self._at < len(self._data)

    def take(self, length: int) -> bytes:
        """Return the next ``length`` bytes, fewer at the end."""
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))

    def bits(self, count: int) -> int:
        """Return a number of ``count`` bits; the missing ones are 0."""
        number = int.from_bytes(self.take((count + 7) // 8), "little")
        return number & (1 << count) - 1

    def number(self, low: int, high: int) -> int:
        """Return a number from ``low`` to ``high``, both included."""
        span = high - low + 1
        return low + self.bits((span - 1).bit_length() if span > 1 else 0) % span

    def chance(self, of_256: int) -> bool:
        """Return True for ``of_256`` of the 256 values of a byte; False at the end."""
        return self.more and self.bits(8) >= 256 - of_256

    def pick(self, choices: Sequence[T]) -> T:
        """Return one of ``choices``."""
        return choices[self.number(0, len(choices) - 1)]

    def edge(self, *values: int, bits: int = 64) -> int:
        """Return one of ``values``, their neighbour, a power of 2 or anything of ``bits`` bits."""
        kind = self.bits(3)
        if kind < 4 and values:
            number = self.pick(values)
        elif kind == 4 and values:
            number = self.pick(values) + self.pick((-1, 1, 2, -2))
        elif kind == 5:
            number = (1 << self.number(0, bits)) + self.pick((-1, 0, 1))
        elif kind == 6:
            number = self.bits(8)
        else:
            number = self.bits(bits)
        return number & (1 << bits) - 1
