"""A report's file: opened before the boot, so that a mistake costs no boot, and written at its end.
"""

from __future__ import annotations

import contextlib
import os

from pyvmm.errors import ConfigError, HostError


class OutputFile:
    """The file ``path`` of option ``option``; ConfigError if it cannot be opened for writing.

    A context manager.  The file's old content stays until ``write``; a new file that is not
    written is removed.
    """

    def __init__(self, option: str, path: str) -> None:
        self._option = option
        self._path = path
        self._is_new = not os.path.lexists(path)
        self._is_written = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        try:
            self._fd = os.open(path, flags, 0o666)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"{option} {path}", f"cannot be written: {why}") from None

    def write(self, text: str) -> None:
        """Make ``text`` the file's content; HostError that names the file."""
        data = text.encode("utf-8", "backslashreplace")
        self._is_written = True
        try:
            with contextlib.suppress(OSError):  # a pipe has no length
                os.ftruncate(self._fd, 0)
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise HostError(
                f"{self._option} {self._path}: cannot be written: {error.strerror}"
            ) from None

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)
        if self._is_new and not self._is_written:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
