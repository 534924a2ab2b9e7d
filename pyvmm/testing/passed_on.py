"""A guest's output on its way to a descriptor of ours: as it is, or made harmless for a terminal.

A pipe or a file gets every byte, at once.  A terminal gets text, line ends, tabs and colours; other
control sequences are spelled out, because a terminal would obey them and answer some as if typed.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import select
import stat
import time
from collections.abc import Callable

from pyvmm.report import escape

PATIENCE_S = 2.0
LOOK_S = 0.2
_ROOM_BYTES = 4096
MAX_HELD = 32
"""Characters of an unfinished control sequence that wait for the rest."""
_UNFINISHED = re.compile(rf"\x1b(?:\[[0-9;:]{{0,{MAX_HELD}}})?\Z")
_KEPT = re.compile(r"(\x1b\[[0-9;:]{0,64}m|\r?\n|[\t\r])")


class PassedOn:
    """Writes a guest's bytes to ``fd``, waiting for its reader; one thread alone may write.

    ``is_terminal`` makes them harmless.  If the reader is gone, the disk is full, or the reader
    takes nothing for PATIENCE_S while ``gives_up`` returns True, ``problem`` says so, and later
    bytes are dropped.
    """

    def __init__(
        self,
        fd: int,
        *,
        is_terminal: bool | None = None,
        gives_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._fd = fd
        self._is_terminal = os.isatty(fd) if is_terminal is None else is_terminal
        self._gives_up = gives_up
        self._waits = _may_wait(fd)
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""
        self._has_written = False
        self.problem: OSError | None = None
        self.line_ended = True
        """True if the last byte ended a line."""

    def write(self, data: bytes) -> None:
        """Pass ``data`` on."""
        if not data:
            return
        self._has_written = True
        self.line_ended = data.endswith(b"\n")
        self._write(self._harmless(data) if self._is_terminal else data)

    def end(self) -> None:
        """Pass on what was held back, at the end of the stream."""
        if self._is_terminal:
            rest = self._held + self._decoder.decode(b"", final=True)
            self._held = ""
            self._write(escape(rest).encode() if rest else b"")
            if self._has_written:
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
                if not self._waits:
                    view = view[os.write(self._fd, view) :]
                elif self._has_room():
                    # poll(2): a pipe that is writable takes so many bytes without waiting.
                    view = view[os.write(self._fd, view[:_ROOM_BYTES]) :]
            except BlockingIOError:
                continue  # another writer was faster
            except OSError as error:
                self.problem = error

    def _has_room(self) -> bool:
        """Wait until the reader takes bytes; OSError if it does not and it is time to give up."""
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        since_s = time.monotonic()
        while not poller.poll(LOOK_S * 1000):
            if time.monotonic() - since_s > PATIENCE_S and self._gives_up():
                raise OSError(errno.ETIMEDOUT, "its reader takes nothing")
        return True


def _may_wait(fd: int) -> bool:
    """True unless ``fd`` is a regular file, which always takes bytes or refuses them."""
    try:
        return not stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False
