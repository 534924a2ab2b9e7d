"""One file's or directory's bytes between this process and the guest: a request with a pipe."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Mapping

from pyvmm.control.client import Pending
from pyvmm.errors import AgentError, HostError
from pyvmm.launcher.pump import make_pipe
from pyvmm.launcher.session import Session
from pyvmm.report import escape

SIGKILL = 9
CHUNK_BYTES = 256 << 10


class Transfer:
    """A request ``method`` whose data goes through a pipe, here non-blocking; a context manager.

    ``write`` or ``read`` it as a file, then ``finish``.  Whoever leaves it without has the agent
    stop.  ``what`` is the call in messages.
    """

    def __init__(
        self, session: Session, method: str, params: Mapping[str, object], *, is_input: bool,
        timeout_s: float, what: str,
    ) -> None:
        session.state.refuse_own_thread(what)
        self._session = session
        self._what = what
        self._timeout_s = timeout_s
        self._until_s = time.monotonic() + timeout_s
        self._fd = -1
        self._call: Pending
        with contextlib.ExitStack() as ours:
            try:
                read_end, write_end = make_pipe()
                self._fd, other = (write_end, read_end) if is_input else (read_end, write_end)
                ours.callback(os.close, self._fd)
                with contextlib.ExitStack() as theirs:
                    theirs.callback(os.close, other)
                    self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    ours.callback(os.close, self._wake_fd)
                    self._call = session.send(method, {**params, "fd": 0}, [other])
            except OSError as error:
                raise HostError(f"{what}: {error}") from error
            os.set_blocking(self._fd, False)
            ours.pop_all()

    def write(self, data: bytes) -> int:
        """Send all of ``data``; AgentError if the agent takes no more, saying why."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fd, left[:CHUNK_BYTES]) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except BrokenPipeError:
                self.finish()
                raise AgentError(f"{self._what}: the agent took only a part of it") from None
        return len(data)

    def read(self, count: int) -> bytes:
        """Return up to ``count`` bytes, b"" at the end."""
        while True:
            try:
                return os.read(self._fd, count)
            except BlockingIOError:
                self._wait(select.POLLIN)

    def finish(self) -> None:
        """End the data and wait until the agent has done its part; AgentError if it could not."""
        os.close(self._fd)
        self._fd = -1
        while not self._call.done():
            self._wait(0)
        result = self._session.result_of(self._call, self._what)
        kind, value = result.get("kind"), result.get("value")
        reason = escape(str(result.get("reason", "")))
        if kind == "lost":
            self._session.raise_lost(self._what, reason)
        if kind != "exited" or value != 0:
            number = value if kind == "failed" and isinstance(value, int) else 0
            raise AgentError(f"{self._what}: {reason or os.strerror(number)}", number)

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._call.done():
            self._session.tell("agent.kill", {"request": self._call.id, "signal": SIGKILL})
        for fd in (self._fd, self._wake_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._wake_fd = -1

    def _wait(self, events: int) -> None:
        """Wait until the pipe is ready for ``events``, or something else has changed."""
        with self._session.state.waking(lambda: os.eventfd_write(self._wake_fd, 1)):
            if not self._call.done():
                self._session.state.raise_if_over(self._what)
            elif not events:
                return
            left_s = self._until_s - time.monotonic()
            if left_s <= 0:
                raise AgentError(f"{self._what}: was not done within {self._timeout_s:g} s")
            poller = select.poll()
            if events:
                poller.register(self._fd, events)
            poller.register(self._wake_fd, select.POLLIN)
            poller.poll(left_s * 1000)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
