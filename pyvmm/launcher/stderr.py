"""The lines that the process of a machine prints on its standard error."""

from __future__ import annotations

import os
from collections.abc import Callable

from pyvmm.report import escape

MAX_LINE_BYTES = 4096
KEPT_BYTES = 16 << 10
"""Of all that came, so much of the end is kept for the message if the process dies."""
_PREFIX = b"pyvmm: "


class StderrLines:
    """Reads the non-blocking descriptor ``fd`` and calls ``report`` with each line."""

    def __init__(self, fd: int, report: Callable[[str], None]) -> None:
        self._fd = fd
        self._report = report
        self._line = bytearray()
        self._kept = bytearray()

    @property
    def text(self) -> str:
        """Return the end of all that came as one line for a person."""
        text = self._kept.decode("utf-8", "replace").replace(_PREFIX.decode(), "")
        return escape("; ".join(text.split("\n")[-5:]).strip("; "))

    def read(self) -> bool:
        """Take some of what has come; False at the end."""
        return self._read() != 0

    def finish(self) -> None:
        """Take what is left once the process has ended, without waiting."""
        while self._read() > 0:
            pass
        if self._line:
            self._tell(self._line)
            self._line = bytearray()

    def _read(self) -> int:
        """Return how many bytes were taken: 0 at the end, -1 if none are there now."""
        try:
            data = os.read(self._fd, 64 << 10)
        except BlockingIOError:
            return -1
        except OSError:
            return 0
        self._kept = (self._kept + data)[-KEPT_BYTES:]
        self._line += data
        *lines, self._line = self._line.split(b"\n")
        for line in lines:
            self._tell(line)
        if len(self._line) > MAX_LINE_BYTES:
            self._tell(self._line)
            self._line = bytearray()
        return len(data)

    def _tell(self, line: bytes | bytearray) -> None:
        text = line[:MAX_LINE_BYTES].removeprefix(_PREFIX).decode("utf-8", "replace")
        self._report(text)
