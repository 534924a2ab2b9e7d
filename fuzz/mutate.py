"""Mutations of byte strings, for fuzzing without atheris."""

from __future__ import annotations

import random
from collections.abc import Sequence

_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF,
          (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


class Mutator:
    """Makes new cases of old ones: ``words`` are what to insert besides noise."""

    def __init__(self, rng: random.Random, words: Sequence[bytes], max_bytes: int) -> None:
        self._rng = rng
        self._words = words
        self._max_bytes = max_bytes

    def noise(self) -> bytes:
        """Return random bytes; short ones are as likely as long ones."""
        top = self._rng.randrange(1, self._max_bytes.bit_length() + 1)
        return self._rng.randbytes(min(self._max_bytes, self._rng.randrange(1 << top)))

    def mutate(self, case: bytes, other: bytes) -> bytes:
        """Return ``case`` with some changes, in which there may be parts of ``other``."""
        data = bytearray(case)
        for _ in range(1 << self._rng.randrange(5)):
            self._change(data, other)
        return bytes(data[: self._max_bytes])

    def _change(self, data: bytearray, other: bytes) -> None:
        rng = self._rng
        at = rng.randrange(len(data) + 1)
        match rng.randrange(10):
            case 0 | 1 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 2 if data:
                data[at % len(data)] = rng.randrange(256)
            case 3:
                del data[at : at + self._span(len(data))]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 5:  # a number
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice(_EDGES) + rng.randrange(-2, 3) & (1 << 8 * width) - 1
                data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
            case 6 if self._words:
                data[at : at + rng.choice((0, 0, 4))] = rng.choice(self._words)
            case 7 if data:  # twice the same
                start = rng.randrange(len(data))
                data[at:at] = data[start : start + self._span(len(data))]
            case 8 if other:
                start = rng.randrange(len(other))
                data[at:at] = other[start : start + self._span(len(other))]
            case 9:
                del data[at:]
            case _:
                data[at : at + 4] = rng.randbytes(4)

    def _span(self, length: int) -> int:
        """A length of a piece of ``length`` bytes: rarely a long one."""
        return self._rng.randrange(1, 1 + max(1, length >> self._rng.randrange(8)))
