"""Bytes between pipes and memory or files, in the calling thread, until somebody has the answer.

The pipes lead to the process of a machine.  All of them are non-blocking here and polled together,
so that no stream waits for another.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable

from pyvmm.launcher.session import Session

CHUNK_BYTES = 64 << 10
PIPE_BYTES = 1 << 20
"""The size asked for: the default of 64 KiB costs a third of the throughput."""
_F_SETPIPE_SZ = 1031  # fcntl.h


def make_pipe() -> tuple[int, int]:
    """Return both ends of a new pipe, a large one if the host allows it."""
    import fcntl

    read_end, write_end = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(write_end, _F_SETPIPE_SZ, PIPE_BYTES)
    return read_end, write_end


class Pump:
    """Moves bytes until ``is_done`` and all that was added to read is at its end.

    ``what`` is the call in messages.
    """

    def __init__(self, session: Session, what: str) -> None:
        self._session = session
        self._what = what
        self._poller = select.poll()
        self._readers: dict[int, Callable[[bytes], None]] = {}
        self._writers: dict[int, tuple[Callable[[], memoryview | None], Callable[[], None]]] = {}
        self._rest: dict[int, memoryview] = {}

    def add_reader(self, fd: int, take: Callable[[bytes], None]) -> None:
        """Have ``take`` called with what comes from ``fd``; it may raise."""
        os.set_blocking(fd, False)
        self._readers[fd] = take
        self._poller.register(fd, select.POLLIN)

    def add_writer(
        self, fd: int, give: Callable[[], memoryview | None], close: Callable[[], None]
    ) -> None:
        """Write what ``give`` returns to ``fd`` until that is None; then call ``close``.

        Also if the reader at the other end has gone.
        """
        os.set_blocking(fd, False)
        self._writers[fd] = (give, close)
        self._rest[fd] = memoryview(b"")
        self._poller.register(fd, select.POLLOUT)

    def run(self, is_done: Callable[[], bool], until_s: float | None) -> bool:
        """Move bytes until all is done; False if the time ``until_s`` (monotonic) came first.

        Raises the error given to ``Vm.fail``, and EndedError if the run ends first.
        """
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._poller.register(wake_fd, select.POLLIN)
            with self._session.state.waking(lambda: os.eventfd_write(wake_fd, 1)):
                return self._run(wake_fd, is_done, until_s)
        finally:
            self._poller.unregister(wake_fd)
            os.close(wake_fd)
            for fd in self._readers:  # after a time limit the caller may read on
                os.set_blocking(fd, True)

    def rest_of(self, fd: int) -> memoryview:
        """Return the bytes of the last piece for ``fd`` that are not written yet."""
        return self._rest.get(fd, memoryview(b""))

    def _run(self, wake_fd: int, is_done: Callable[[], bool], until_s: float | None) -> bool:
        while True:
            self._session.state.raise_if_failed()
            if is_done() and not self._readers:
                return True
            if not is_done():
                self._session.state.raise_if_over(self._what)
            left_ms = None if until_s is None else (until_s - time.monotonic()) * 1000
            if left_ms is not None and left_ms <= 0:
                return False
            for fd, _ in self._poller.poll(left_ms):
                if fd == wake_fd:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                elif fd in self._readers:
                    self._read(fd)
                elif fd in self._writers:
                    self._write(fd)

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        if data:
            self._readers[fd](data)
        else:
            self._poller.unregister(fd)
            del self._readers[fd]

    def _write(self, fd: int) -> None:
        give, close = self._writers[fd]
        rest: memoryview | None = self._rest[fd] or give()
        try:
            if rest is not None:
                self._rest[fd] = rest[os.write(fd, rest[:CHUNK_BYTES]) :]
        except BlockingIOError:
            assert rest is not None
            self._rest[fd] = rest
        except BrokenPipeError:
            rest = None
        if rest is None:
            self._poller.unregister(fd)
            del self._writers[fd]
            close()
