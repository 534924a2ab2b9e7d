"""Where the console goes, as ``--console`` names it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from pyvmm.errors import ConfigError


class Console:
    """Where the guest's console goes: ``input_fd`` (None: no input) and ``output_fd``."""

    def __init__(
        self, input_fd: int | None, output_fd: int | None, *, owns_output: bool = False
    ) -> None:
        self.input_fd = input_fd
        self.output_fd = output_fd
        self._owns_output = owns_output

    @classmethod
    def open(cls, where: str) -> Console:
        """``stdio``, ``none``, or a file to (over)write; ConfigError if it cannot be."""
        if where == "none":
            return cls(None, None)
        if where == "stdio":
            sys.stdout.flush()
            return cls(_readable(0), 1 if _is_open(1) else None)
        try:
            fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"--console {where}", f"cannot be written: {error.strerror}; "
                "give stdio, none, or a file that can be created"
            ) from None
        return cls(None, fd, owns_output=True)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal; (0, 0) if there is none."""
        if self.output_fd is None:
            return (0, 0)
        try:
            columns, rows = os.get_terminal_size(self.output_fd)
        except OSError:
            return (0, 0)
        return (columns, rows)

    def begin(self) -> None:
        """Empty the file for a run that is about to start; a refused run leaves it as it was."""
        if self._owns_output and self.output_fd is not None:
            with contextlib.suppress(OSError):  # what has no length: a device, a FIFO
                os.ftruncate(self.output_fd, 0)

    def close(self) -> None:
        """Close a file opened by ``open``; idempotent."""
        if self._owns_output and self.output_fd is not None:
            os.close(self.output_fd)
            self.output_fd = None


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _readable(fd: int) -> int | None:
    """``fd`` if it can be read without being stopped for it (a background job's terminal)."""
    if not _is_open(fd):
        return None
    try:
        if os.isatty(fd) and os.tcgetpgrp(fd) != os.getpgrp():
            return None
    except OSError:
        return None
    return fd
