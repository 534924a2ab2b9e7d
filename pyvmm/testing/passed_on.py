"""A guest's output on its way to a descriptor of ours: as it is, or made harmless for a terminal.

A pipe or a file gets every byte, at once.  A terminal gets text, line ends, tabs and colours; other
control sequences are spelled out, because a terminal would obey them and answer some as if typed.
"""

from __future__ import annotations

import codecs
import os
import re

from pyvmm.report import escape

MAX_HELD = 32
"""Characters of an unfinished control sequence that wait for the rest."""
_COLOUR = re.compile(r"\x1b\[[0-9;:]{0,64}m")
_UNFINISHED = re.compile(rf"\x1b(?:\[[0-9;:]{{0,{MAX_HELD}}})?\Z")
_KEPT = re.compile(r"(\x1b\[[0-9;:]{0,64}m|\r?\n|[\t\r])")


class PassedOn:
    """Writes a guest's bytes to ``fd``, waiting for its reader; one thread alone may write.

    ``is_terminal`` makes them harmless.  ``tail`` keeps the last ``kept_bytes``.  If the reader is
    gone or the disk is full, ``problem`` says so, and later bytes are only counted.
    """

    def __init__(
        self, fd: int, *, is_terminal: bool | None = None, kept_bytes: int = 64 << 10
    ) -> None:
        self._fd = fd
        self._is_terminal = os.isatty(fd) if is_terminal is None else is_terminal
        self._kept_bytes = kept_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""
        self.tail = bytearray()
        self.bytes = 0
        self.problem: OSError | None = None
        self.line_ended = True
        """True if the last byte ended a line."""

    def write(self, data: bytes) -> None:
        """Pass ``data`` on."""
        if not data:
            return
        self.bytes += len(data)
        self.line_ended = data.endswith(b"\n")
        self.tail += data
        if len(self.tail) > 2 * self._kept_bytes:
            del self.tail[: -self._kept_bytes]
        self._write(self._harmless(data) if self._is_terminal else data)

    def end(self) -> None:
        """Pass on what was held back, at the end of the stream."""
        if self._is_terminal:
            rest = self._held + self._decoder.decode(b"", final=True)
            self._held = ""
            self._write(escape(rest).encode() if rest else b"")
            if self.bytes:
                self._write(b"\x1b[0m")  # whatever colour was left

    def _harmless(self, data: bytes) -> bytes:
        text = self._held + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text)
        self._held = unfinished[0] if unfinished and len(unfinished[0]) <= MAX_HELD else ""
        text = text[: len(text) - len(self._held)]
        parts = (
            part if _KEPT.fullmatch(part) else escape(part) for part in _KEPT.split(text) if part
        )
        return "".join(parts).encode()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and self.problem is None:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                _wait_for_room(self._fd)
            except OSError as error:
                self.problem = error


def _wait_for_room(fd: int) -> None:
    """Wait until ``fd``, which somebody made non-blocking, takes bytes again."""
    import select

    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    poller.poll()
