"""The files of ``--pyvmm-logs``: one for each test's console, and marks in those that are shared.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.report import escape

MAX_NAME_BYTES = 160
"""Of a directory's or a file's name: file systems take 255, and a number comes behind it."""


class Logs:
    """Names the files below ``directory`` (None: there are no logs).

    ``worker`` is pytest-xdist's name of this process, "" without it.
    """

    def __init__(self, directory: Path | None, worker: str = "") -> None:
        self._directory = directory
        self._worker = worker
        self._used: dict[Path, int] = {}

    def of_test(self, nodeid: str) -> Path | None:
        """Return a new, empty file for a guest of the test ``nodeid``; None without logs."""
        return self._new(*parts_of(nodeid))

    def of_shared(self, nodeid: str, kernel: str) -> Path | None:
        """Return a new, empty file for a guest that the tests below ``nodeid`` share."""
        name = "shared" if nodeid else "session"
        if self._worker:
            name += f"-{self._worker}"
        if kernel:
            name += f"[{kernel}]"
        return self._new(*parts_of(nodeid), name)

    def of_origin(self) -> Path | None:
        """Return a new, empty file for a guest that is booted to be cloned."""
        return self._new(f"cloned-{self._worker}" if self._worker else "cloned")

    def _new(self, *parts: str) -> Path | None:
        if self._directory is None:
            return None
        stem = self._directory.joinpath(*parts)
        number = self._used[stem] = self._used.get(stem, 0) + 1
        path = stem.with_name(f"{stem.name}{f'.{number}' if number > 1 else ''}.log")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        except OSError as error:
            raise HostError(f"--pyvmm-logs {path}: {error.strerror}") from error
        return path


def parts_of(nodeid: str) -> list[str]:
    """Return the path below the logs' directory for a test: no two tests have the same."""
    place, bracket, parameters = nodeid.partition("[")
    parts = [
        part for whole in place.split("::") for part in whole.split("/") if part not in ("", ".")
    ]
    if parts:
        parts[-1] += bracket + parameters
    return [_file_name(part) for part in parts]


def _file_name(text: str) -> str:
    """Return ``text`` as a file's name: if it has to be changed, with a mark of its own."""
    name = re.sub(r"[^\w.,=+~@\[\] -]", "_", text.replace("..", "__"), flags=re.ASCII)
    if name == text and len(name) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[:MAX_NAME_BYTES]}-{digest}"


def write_mark(path: Path | None, text: str) -> None:
    """Append a line of ours to a console's file; the guest's process appends to it, too."""
    if path is None:
        return
    line = f"\n==== pyvmm: {escape(text)} ====\n".encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"--pyvmm-logs {path}: {error.strerror}") from error
