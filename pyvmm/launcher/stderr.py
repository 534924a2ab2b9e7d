"""The lines that the process of a machine prints on its standard error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from pyvmm.report import escape

MAX_LINE_BYTES = 4096
KEPT_BYTES = 16 << 10
"""Of all that came, so much of the end is kept for the message if the process dies."""
SHOWN_LINES = 5
_PREFIX = b"pyvmm: "


class StderrThread:
    """A thread that reads ``fd`` to its end and calls ``report`` with each line.

    Until ``release`` the lines are only kept: if the machine cannot be built, they are in the
    error.
    """

    def __init__(self, fd: int, report: Callable[[str], None], *, name: str) -> None:
        self._fd = fd
        self._report = report
        self._lock = threading.Lock()
        self._is_released = False
        self._line = bytearray()
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """Return the last lines as one line for a person."""
        with self._lock:
            lines = self._kept.split(b"\n")
        texts = [line.removeprefix(_PREFIX).decode("utf-8", "replace") for line in lines if line]
        return escape("; ".join(texts[-SHOWN_LINES:]))

    def release(self) -> None:
        """Report the lines that have come, and all that come."""
        with self._lock:
            self._is_released = True
            *lines, self._line = self._line.split(b"\n")
            self._tell(lines)

    def join(self) -> None:
        """Wait for the end of the stream, which is the process's."""
        self._thread.join()

    def _run(self) -> None:
        while data := os.read(self._fd, 64 << 10):
            with self._lock:
                self._kept = (self._kept + data)[-KEPT_BYTES:]
                self._line += data
                if self._is_released:
                    *lines, self._line = self._line.split(b"\n")
                    if len(self._line) > MAX_LINE_BYTES:
                        lines.append(self._line)
                        self._line = bytearray()
                    self._tell(lines)
                else:
                    self._line = self._line[-KEPT_BYTES:]

    def _tell(self, lines: list[bytearray]) -> None:
        for line in lines:
            text = line[:MAX_LINE_BYTES].removeprefix(_PREFIX).decode("utf-8", "replace")
            self._report(text)


def log_line(line: str) -> None:
    """Give a line of the machine's process to the logger ``pyvmm``."""
    import logging

    # A line that ends so tells of work under way, such as making an initramfs: nothing is odd.
    level = logging.INFO if line.endswith("...") else logging.WARNING
    logging.getLogger("pyvmm").log(level, "%s", escape(line))
