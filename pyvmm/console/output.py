"""The guest's output on its way to the host.

vCPU threads write it into a bounded buffer, and the main thread moves it to the host.  So a
terminal that is slow or stopped never makes a run unstoppable.  A full buffer makes the vCPU wait,
so no byte is lost.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable

from pyvmm.report import write_now

GATHER_S, STREAM_GATHER_S = 0.01, 0.05
"""Seconds that console bytes may gather before they are shown."""
DRAIN_TIMEOUT_S = 2.0
READER_S = 0.1
"""Seconds between two looks at a FIFO that nobody reads."""
STALL_S = 0.3
"""A reader that takes nothing for so many seconds does not read: the end of a run does not wait."""


class OutputBuffer:
    """Bytes on their way from the guest to a host file descriptor (None: nowhere).

    ``wake`` is called, from the writer's thread, when the first byte comes and when a whole chunk
    waits.  In between the draining thread may let bytes gather, because a wake-up for each byte
    would cost more than the exits that bring them.  ``observe`` sees every byte once, in order,
    from the draining thread.  ``write`` writes to ``fd`` as ``report.Outlet.write`` does.
    """

    LIMIT = 64 * 1024
    CHUNK = 4096

    def __init__(
        self,
        fd: int | None,
        wake: Callable[[], None],
        observe: Callable[[bytes], None],
        write: Callable[[bytes], int] | None = None,
    ) -> None:
        self.fd = fd
        self._write = write
        self._wake = wake
        self._observe = observe
        # The lock is taken once a character: directly, not through the slower Condition.
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._data = bytearray()
        self._ours = bytearray()
        self._open = True
        self._observed_bytes = 0
        """The number of waiting bytes that were observed before they are shown."""
        self.as_shown: Callable[[bytes], bytes] = bytes
        """Turns the guest's bytes into those that are written, as many; ``observe`` gets the
        guest's."""
        self.taken_bytes = 0
        """The number of bytes that the host has taken so far, our own lines among them."""
        self.line_ended = True
        """True if the last byte shown ended a line."""

    def add_observer(self, observe: Callable[[bytes], None]) -> None:
        """Have ``observe`` see every byte, too; before the run."""
        first = self._observe

        def both(data: bytes) -> None:
            first(data)
            observe(data)

        self._observe = both

    def write(self, data: bytes) -> None:
        """Add the guest's ``data``; waits while the buffer is full, unless it was shut."""
        with self._lock:
            while len(self._data) >= self.LIMIT and self._open:
                self._room.wait()
            before = len(self._data)
            self._data += data
        if not before or before < self.CHUNK <= before + len(data):
            self._wake()

    def say(self, text: str) -> None:
        """Show our own ``text`` ahead of the waiting bytes; the observer does not see it."""
        with self._lock:
            self._ours += text.encode()
        self._wake()

    @property
    def pending(self) -> bool:
        """True if bytes wait to be drained."""
        return bool(self._data or self._ours)

    @property
    def has_chunk(self) -> bool:
        """True if so many bytes wait that gathering more makes no sense."""
        return len(self._data) >= self.CHUNK

    def drain(self) -> bytes:
        """Write as much of one chunk as the host takes; return the guest's bytes of it, as shown.

        OSError if the host refuses (they are dropped).
        """
        with self._lock:
            waiting = self._ours or self._data
            chunk = bytes(waiting[: self.CHUNK])
            if not chunk:
                return b""
        shown = self.as_shown(chunk) if waiting is self._data else chunk
        done = len(chunk)
        try:
            if self.fd is not None:
                with contextlib.suppress(BlockingIOError):
                    done = 0
                    done = self._write(shown) if self._write else write_now(self.fd, shown)
        except OSError:
            done = len(chunk)
            raise
        finally:
            with self._lock:
                del waiting[:done]
                self.taken_bytes += done
                self._room.notify_all()
            if done:
                self.line_ended = chunk[done - 1] == 0x0A
            if waiting is self._data:
                known = min(self._observed_bytes, done)
                self._observed_bytes -= known
                if known < done:
                    self._observe(chunk[known:done])
        return shown[:done] if waiting is self._data else b""

    def observe_all(self) -> None:
        """Have the observers see the waiting bytes now, before they are shown.

        Call it in the draining thread.
        """
        with self._lock:
            ahead = bytes(self._data[self._observed_bytes :])
            self._observed_bytes = len(self._data)
        if ahead:
            self._observe(ahead)

    def reopen(self, fd: int | None) -> None:
        """Take bytes for ``fd`` again, after ``shut`` and ``give_up``: another run begins."""
        self.fd = fd
        self._open = True

    def give_up(self) -> None:
        """Show the waiting bytes to the observer only, because the host takes no more."""
        self.fd = None
        while self.pending:
            self.drain()

    def shut(self) -> None:
        """Let writers through from now on: the run is over, and these are its last bytes."""
        with self._lock:
            self._open = False
            self._room.notify_all()


class OutputPump:
    """Shows the bytes of an OutputBuffer, for the thread that has to wait for other things too.

    Bytes gather until there is a chunk of them, or for GATHER_S, so that an echo is prompt.  While
    they keep coming they gather for STREAM_GATHER_S, so that showing them costs little.  ``lost``
    is called with the error when the host refuses bytes for good; later bytes go only to the
    observer.  ``shown`` gets the guest's bytes that the host has taken.  Nothing is written, and so
    refused, until ``has_reader()``.
    """

    def __init__(
        self,
        output: OutputBuffer,
        lost: Callable[[OSError], None],
        shown: Callable[[bytes], None] | None = None,
        has_reader: Callable[[], bool] = lambda: True,
    ) -> None:
        self._output = output
        self._lost = lost
        self._shown = shown
        self._has_reader = has_reader
        self._due_s: float | None = None
        self._shown_s = 0.0
        self._offered_s: float | None = None
        """The time since when the host has taken nothing of the waiting bytes."""

    def fd_to_write(self) -> int | None:
        """Return the fd that must be writable for ``write``; None if it is not time yet."""
        output = self._output
        if not output.pending:
            self._due_s = None
            return None
        now_s = time.monotonic()
        if self._due_s is None:
            streams = now_s < self._shown_s + 2 * STREAM_GATHER_S
            self._due_s = now_s + (STREAM_GATHER_S if streams else GATHER_S)
        if not output.has_chunk and now_s < self._due_s:
            return None
        if output.fd is None:
            # Nobody takes the bytes, but those who observe them see a panic all the same.
            output.give_up()
            self._due_s, self._shown_s = None, now_s
            return None
        if self._offered_s is None:
            self._offered_s = now_s
        if not self._has_reader():
            self._due_s = now_s + READER_S
            return None
        return output.fd

    @property
    def due_s(self) -> float | None:
        """Return when it will be time, if nothing else comes; None if nothing waits."""
        return self._due_s

    def write(self) -> None:
        """Show as much as the host takes now."""
        taken_bytes = self._output.taken_bytes
        try:
            data = self._output.drain()
            if self._shown is not None:
                self._shown(data)
        except OSError as error:
            self._output.fd = None
            self._lost(error)
        self._due_s, self._shown_s = None, time.monotonic()
        if self._output.taken_bytes != taken_bytes:
            self._offered_s = None

    def finish(self, patience_s: float) -> bool:
        """Show the last of the output, for DRAIN_TIMEOUT_S at most; True if all was taken.

        It is given up earlier if the host has taken nothing for ``patience_s``, which may have
        begun before the end.
        """
        output = self._output
        until_s = time.monotonic() + DRAIN_TIMEOUT_S
        is_last = False
        while output.pending and not is_last:
            if output.fd is not None:
                now_s = time.monotonic()
                if self._offered_s is None:
                    self._offered_s = now_s
                left_s = min(until_s, self._offered_s + patience_s) - now_s
                is_last = left_s <= 0
                if not self._has_reader():
                    time.sleep(max(0.0, min(left_s, READER_S)))
                    continue
                poller = select.poll()
                poller.register(output.fd, select.POLLOUT)
                if not poller.poll(max(0.0, left_s) * 1000):
                    continue
            self.write()
        is_all = not output.pending
        output.give_up()
        return is_all


class LineWatch:
    """Splits console output into lines and shows each to ``on_line``, at most ``LIMIT`` bytes."""

    LIMIT = 1024

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self.unfinished = b""
        """The start of the line that has no end yet, at most ``LIMIT`` bytes."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of output; call ``on_line`` for every line they complete."""
        *lines, rest = (self.unfinished + data).split(b"\n")
        for line in lines:
            self._on_line(line[: self.LIMIT].rstrip(b"\r"))
        self.unfinished = rest[: self.LIMIT]
