"""The place of the console, as ``--console`` names it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import sys

from pyvmm.console.terminal import Screen, is_behind
from pyvmm.errors import ConfigError
from pyvmm.report import Outlet

_DESCRIPTORS = ("/dev/fd/", "/proc/self/fd/", "/proc/thread-self/fd/", f"/proc/{os.getpid()}/fd/")


class Console:
    """The place of the guest's console: ``input_fd`` (None: no input) and ``output_fd``.

    The user calls it ``name``.
    """

    def __init__(
        self,
        input_fd: int | None,
        output_fd: int | None,
        *,
        name: str = "",
        owns_output: bool = False,
        is_emptied: bool = False,
    ) -> None:
        self.input_fd = input_fd
        self.output_fd = output_fd
        self.outlet = None if output_fd is None else Outlet(output_fd, is_ours=is_emptied)
        """Writes to ``output_fd``."""
        self.name = name
        self.screen = Screen.behind(output_fd)
        """The terminal where the output ends; None if there is none."""
        self._owns_output = owns_output
        self._is_emptied = is_emptied
        self._awaits_reader = owns_output and output_fd is not None and _is_fifo(output_fd)

    @classmethod
    def open(cls, where: str) -> Console:
        """Open ``stdio``, ``none``, or a file to (over)write; ConfigError if that fails.

        The file may be our standard output or error already, or a descriptor with which we were
        started.  Then output goes on there, and appends if that does.  Never waits.
        """
        if where == "none":
            return cls(None, None)
        if where == "stdio":
            sys.stdout.flush()
            return cls(0 if _is_open(0) else None, 1 if _is_open(1) else None)
        own = _own_descriptor(where)
        try:
            if own is not None:
                return cls(None, os.dup(own), name=where, owns_output=True)
            fd = _open_for_writing(where)
        except OSError as error:
            raise ConfigError(
                f"--console {where}", f"cannot be written: {error.strerror}; "
                "give stdio, none, or a file that can be created"
            ) from None
        return cls(None, fd, name=where, owns_output=True, is_emptied=True)

    def has_reader(self) -> bool:
        """Return False as long as the place is a FIFO that nobody has begun to read."""
        if self._awaits_reader and self.output_fd is not None:
            poller = select.poll()
            poller.register(self.output_fd, select.POLLOUT)
            # pipe(7), poll(2): a write end without a reader polls POLLERR.
            self._awaits_reader = any(events & select.POLLERR for _, events in poller.poll(0))
        return not self._awaits_reader

    def as_shown(self, data: bytes) -> bytes:
        """Return the guest's ``data`` as it may be shown.

        In the background it has no control sequences, because the shell would read the terminal's
        answers.
        """
        if self.screen is None or self.output_fd is None or not is_behind(self.output_fd):
            return data
        return self.screen.queries.defused(data)

    @property
    def size(self) -> tuple[int, int]:
        """The terminal's columns and rows; (0, 0) without a terminal."""
        if self.output_fd is None:
            return (0, 0)
        try:
            columns, rows = os.get_terminal_size(self.output_fd)
        except OSError:
            return (0, 0)
        return (columns, rows)

    def begin(self) -> None:
        """Empty the file for a run that is about to start; a refused run leaves it as it was."""
        if self._is_emptied and self.output_fd is not None:
            with contextlib.suppress(OSError):  # a device or a FIFO has no length
                os.ftruncate(self.output_fd, 0)

    def close(self) -> None:
        """Close a file opened by ``open``, and what was opened to write to it; idempotent."""
        if self.outlet is not None:
            self.outlet.close()
        if self.screen is not None:
            self.screen.close()
        if self._owns_output and self.output_fd is not None:
            os.close(self.output_fd)
            self.output_fd = None


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _own_descriptor(where: str) -> int | None:
    """Return the descriptor of ours that ``where`` is another name of.

    That is standard output or error, or a descriptor with which we were started; None if there is
    none that can be written.
    """
    numbered = []
    for prefix in _DESCRIPTORS:
        number = where.removeprefix(prefix)
        if number != where and number.isdecimal() and len(number) < 8:
            numbered.append(int(number))
    for fd in (1, 2, *numbered):
        with contextlib.suppress(OSError, ValueError):
            if not os.path.samestat(os.stat(where), os.fstat(fd)):
                continue
            is_ours = fd > 2 and fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            if not is_ours and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                return fd
    return None


def _open_for_writing(where: str) -> int:
    """Return a descriptor of ``where``, made if it is not there.

    It waits for nobody: not for a FIFO's reader, who may come later, nor for a modem.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(where, flags | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(where).st_mode):
            raise
    # fifo(7): opened for both it is open at once, and then has a reader for the next open.
    both = os.open(where, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.open(f"/proc/self/fd/{both}", flags)
    finally:
        os.close(both)


def _is_fifo(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)
