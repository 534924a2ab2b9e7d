"""A stream of a command's: counted, its end kept, and passed on."""

from __future__ import annotations

from collections.abc import Callable

TAIL_BYTES = 64 << 10


class Sink:
    """Takes a stream; each piece goes to ``pass_on``.  Like a binary file, it has ``write``."""

    def __init__(self, pass_on: Callable[[bytes], object] | None) -> None:
        self._pass_on = pass_on
        self._tail = bytearray()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Take more bytes."""
        self.bytes += len(data)
        self._tail += data
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        if self._pass_on is not None:
            self._pass_on(data)
        return len(data)

    @property
    def tail(self) -> str:
        """Return the last TAIL_BYTES as text; bytes that are no UTF-8 are spelled out."""
        return self._tail[-TAIL_BYTES:].decode("utf-8", "backslashreplace")
