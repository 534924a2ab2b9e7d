"""The memory of a part: a file of lines, one for each trial that has ended, however it ended.

A line is a JSON object and is written in one piece, so a soak that is killed loses the trials
under way and no others.  A last line that was cut is dropped when the file is opened again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

Line = dict[str, Any]


class BusyError(Exception):
    """Somebody else runs the same part."""


class Journal:
    """The lines of the file ``path``, which is made if there is none; locked until it is closed.

    A line with ``leg`` begins a stretch without interruption; one with ``trial`` is a trial's, and
    has ``failed`` if that did; one with ``left`` names what the part has left behind; one with
    ``fresh`` says that published trials do not count as done.
    Its methods may be called from any thread.  BusyError if another process has the file.
    """

    def __init__(self, path: Path, *, is_locked: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            if is_locked:
                self._keep_others_out()
            self._lines = list(read_lines(path))
            os.ftruncate(self._fd, sum(len(_packed(line)) for line in self._lines))
        except BaseException:
            os.close(self._fd)
            raise

    def _keep_others_out(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{self.path}: another soak runs this part") from None

    def add(self, line: Line) -> None:
        """Write ``line``; it is kept from now on, whatever becomes of this process."""
        with self._lock:
            os.write(self._fd, _packed(line))
            self._lines.append(line)

    @property
    def trials(self) -> list[Line]:
        """The trials so far, in the order in which they ended."""
        with self._lock:
            return [line for line in self._lines if "trial" in line]

    @property
    def is_fresh(self) -> bool:
        """True if the part was begun anew, whatever had been published of it."""
        with self._lock:
            return any("fresh" in line for line in self._lines)

    @property
    def legs(self) -> int:
        """How many stretches there were, with the one under way."""
        with self._lock:
            return sum("leg" in line for line in self._lines)

    @property
    def failures(self) -> int:
        """How many lines are of something that failed."""
        with self._lock:
            return sum("failed" in line or "left" in line for line in self._lines)

    def close(self) -> None:
        """Let others have the file."""
        os.close(self._fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of the file ``path``, up to the first one that is none; nothing if it is
    not there."""
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_bytes().splitlines(keepends=True):
            try:
                line = json.loads(text)
            except ValueError:
                return
            if not text.endswith(b"\n") or not isinstance(line, dict) or _packed(line) != text:
                return
            yield line


def _packed(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
