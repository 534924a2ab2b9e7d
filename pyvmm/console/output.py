"""What the guest prints, on its way to the host.

Guest output is written by vCPU threads into a bounded buffer and moved to the host by the main
thread, so that a terminal that is slow or stopped never makes a run unstoppable; a full buffer
makes the vCPU wait, so that no byte is lost.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable

from pyvmm.report import write_now

GATHER_S, STREAM_GATHER_S = 0.01, 0.05
"""How long console bytes may gather before they are shown."""
DRAIN_TIMEOUT_S = 2.0


class OutputBuffer:
    """Bytes on their way from the guest to a host file descriptor (None: nowhere).

    ``wake`` is called, from the writer's thread, when the first byte comes and when a whole chunk
    waits; in between the drainer may let bytes gather (a wake-up a byte would cost more than the
    exits that bring them).  ``observe`` sees every byte once, in order, from the draining thread.
    """

    LIMIT = 64 * 1024
    CHUNK = 4096

    def __init__(
        self, fd: int | None, wake: Callable[[], None], observe: Callable[[bytes], None]
    ) -> None:
        self.fd = fd
        self._wake = wake
        self._observe = observe
        # The lock is taken once a character: directly, not through the slower Condition.
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._data = bytearray()
        self._ours = bytearray()
        self._open = True
        self.line_ended = True
        """Whether the last byte shown ended a line."""

    def write(self, data: bytes) -> None:
        """Add ``data`` of the guest's; waits while the buffer is full, unless it was shut."""
        with self._lock:
            while len(self._data) >= self.LIMIT and self._open:
                self._room.wait()
            before = len(self._data)
            self._data += data
        if not before or before < self.CHUNK <= before + len(data):
            self._wake()

    def say(self, text: str) -> None:
        """Show ``text`` of ours, ahead of what waits; the observer does not see it."""
        with self._lock:
            self._ours += text.encode()
        self._wake()

    @property
    def pending(self) -> bool:
        """Whether bytes wait to be drained."""
        return bool(self._data or self._ours)

    @property
    def has_chunk(self) -> bool:
        """Whether so many wait that waiting for more makes no sense."""
        return len(self._data) >= self.CHUNK

    def drain(self) -> None:
        """Write what the host takes now of one chunk; OSError if it refuses (they are dropped)."""
        with self._lock:
            waiting = self._ours or self._data
            chunk = bytes(waiting[: self.CHUNK])
            if not chunk:
                return
        done = len(chunk)
        try:
            if self.fd is not None:
                with contextlib.suppress(BlockingIOError):
                    done = 0
                    done = write_now(self.fd, chunk)
        except OSError:
            done = len(chunk)
            raise
        finally:
            with self._lock:
                del waiting[:done]
                self._room.notify_all()
            if done:
                self.line_ended = chunk[done - 1] == 0x0A
            if waiting is self._data:
                self._observe(chunk[:done])

    def give_up(self) -> None:
        """The host takes no more: show what waits to the observer only."""
        self.fd = None
        while self.pending:
            self.drain()

    def shut(self) -> None:
        """Let writers through from now on: the run is over and what comes is the last of it."""
        with self._lock:
            self._open = False
            self._room.notify_all()


class OutputPump:
    """Shows what an OutputBuffer holds, for the thread that has to wait for other things too.

    Bytes gather until there is a chunk of them, or for GATHER_S, so that an echo is prompt; for
    STREAM_GATHER_S while they keep coming, so that showing them costs little.  ``lost`` is called
    with the error when the host refuses some for good; what comes later goes to the observer only.
    """

    def __init__(self, output: OutputBuffer, lost: Callable[[OSError], None]) -> None:
        self._output = output
        self._lost = lost
        self._due_s: float | None = None
        self._shown_s = 0.0

    def fd_to_write(self) -> int | None:
        """What to wait for, to call ``write`` when it is writable; None if it is not time yet."""
        output = self._output
        if output.fd is None:
            # Nobody takes the bytes: a panic among them is to be seen all the same.
            while output.pending:
                output.drain()
            self._due_s = None
        if not output.pending:
            return None
        now_s = time.monotonic()
        if self._due_s is None:
            streams = now_s < self._shown_s + 2 * STREAM_GATHER_S
            self._due_s = now_s + (STREAM_GATHER_S if streams else GATHER_S)
        return output.fd if output.has_chunk or now_s >= self._due_s else None

    @property
    def due_s(self) -> float | None:
        """When it will be time, if nothing else comes; None if nothing waits."""
        return self._due_s

    def write(self) -> None:
        """Show what the host takes now."""
        try:
            self._output.drain()
        except OSError as error:
            self._output.fd = None
            self._lost(error)
        self._due_s, self._shown_s = None, time.monotonic()

    def finish(self) -> None:
        """The last of the output, for as long as the host takes it and DRAIN_TIMEOUT_S."""
        until_s = time.monotonic() + DRAIN_TIMEOUT_S
        while self._output.pending and time.monotonic() < until_s:
            if self._output.fd is not None:
                poller = select.poll()
                poller.register(self._output.fd, select.POLLOUT)
                if not poller.poll(100):
                    continue
            self.write()
        self._output.give_up()


class LineWatch:
    """Splits console output into lines and shows each to ``on_line``, at most ``LIMIT`` bytes."""

    LIMIT = 1024

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._partial = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of output; call ``on_line`` for every line they complete."""
        *lines, rest = (self._partial + data).split(b"\n")
        for line in lines:
            self._on_line(line[: self.LIMIT].rstrip(b"\r"))
        self._partial = rest[: self.LIMIT]
