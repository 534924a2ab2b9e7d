"""Jobs of the agent for a client: their streams, and the descriptors that the client gave.

A byte that the client's pipe does not take stays in the guest: no credit is given back for it.
"""

from __future__ import annotations

import functools
import os
import signal
import stat
from collections.abc import Callable, Mapping

from pyvmm.agent.link import Job, JobResult
from pyvmm.control.connection import Call
from pyvmm.control.messages import RequestError
from pyvmm.run.io_loop import IoLoop, IoSource

_PIECE_BYTES = 64 << 10


def check_pipe(fd: int, name: str) -> None:
    """Make ``fd`` non-blocking; RequestError unless it is a pipe or a socket.

    The flag belongs to the open file, which others may share: so it must be the client's own pipe.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise RequestError("params", f"{name}: the descriptor is neither a pipe nor a socket")
    os.set_blocking(fd, False)


class OutputStream:
    """Bytes of the guest on their way into ``fd`` (None: nowhere).

    ``consumed`` is told of those that are gone; ``on_broken`` is called once if nobody reads any
    more; ``on_end`` when all is written, or dropped, and ``fd`` is closed.
    """

    def __init__(
        self,
        loop: IoLoop,
        fd: int | None,
        *,
        consumed: Callable[[int], None],
        on_broken: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._consumed, self._on_broken, self._on_end = consumed, on_broken, on_end
        self._data = bytearray()
        self._source = None if fd is None else IoSource(
            fd, self._write, edge_triggered=False, is_output=True
        )
        self._is_waiting = False
        self._ends = False
        self.has_ended = False

    def add(self, data: bytes) -> None:
        """Take bytes; b"" is the end."""
        if not data:
            self.end()
        elif self._fd is None:
            self._consumed(len(data))
        else:
            self._data += data
            if not self._is_waiting:
                self._write()

    def end(self) -> None:
        """No more bytes come."""
        self._ends = True
        if not self._data:
            self._finish()

    def drop(self) -> None:
        """Forget what waits, and all that still comes: nobody wants it."""
        waiting = len(self._data)
        self._data.clear()
        self._close()
        if waiting:
            self._consumed(waiting)
        if self._ends:
            self._finish()

    def _write(self) -> None:
        if self._fd is None:
            return
        try:
            with memoryview(self._data) as data, data[:_PIECE_BYTES] as piece:
                done = os.write(self._fd, piece)
        except BlockingIOError:
            done = 0
        except OSError:  # nobody reads: as a command that writes into a closed pipe
            self.drop()
            self._on_broken()
            return
        del self._data[:done]
        if self._data and not self._is_waiting and self._source is not None:
            self._is_waiting = True
            self._loop.add(self._source)
        elif not self._data and self._is_waiting and self._source is not None:
            self._is_waiting = False
            self._loop.remove(self._source)
        if done:
            self._consumed(done)
        if self._ends and not self._data:
            self._finish()

    def _finish(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            self._close()
            self._on_end()

    def _close(self) -> None:
        if self._fd is not None:
            if self._source is not None:
                self._loop.remove(self._source)
            os.close(self._fd)
            self._fd = None


class InputStream:
    """Bytes from ``fd`` on their way to the guest, as many as it has room for."""

    def __init__(self, loop: IoLoop, fd: int, job: Callable[[], Job | None]) -> None:
        self._loop = loop
        self._fd = fd
        self._job = job
        self._source = IoSource(fd, self._read, edge_triggered=False)
        self._is_reading = False
        self._is_closed = False

    def look(self) -> None:
        """Read on if there is room."""
        job = self._job()
        reads = not self._is_closed and job is not None and job.room > 0
        if reads != self._is_reading:
            self._is_reading = reads
            (self._loop.add if reads else self._loop.remove)(self._source)

    def close(self) -> None:
        """Read no more; idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._is_reading = False
            self._loop.remove(self._source)
            os.close(self._fd)

    def _read(self) -> None:
        job = self._job()
        if self._is_closed or job is None or not job.room:
            return
        try:
            data = os.read(self._fd, min(job.room, _PIECE_BYTES))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            job.write(data)
            self.look()
        else:
            job.close_input()
            self.close()


class ClientJob:
    """A job for ``call``: the agent's side are ``JobEvents``, the client's are descriptors.

    ``outputs`` are descriptors by stream, None for one that nobody wants.  ``on_over`` is called
    once nothing of it is left.
    """

    def __init__(
        self,
        loop: IoLoop,
        call: Call,
        *,
        input_fd: int | None,
        outputs: Mapping[int, int | None],
        on_over: Callable[[ClientJob], None],
    ) -> None:
        self.call = call
        self.job: Job | None = None
        self._on_over = on_over
        self._result: JobResult | None = None
        self._is_over = False
        self._input = None if input_fd is None else InputStream(
            loop, input_fd, lambda: self.job
        )
        self._outputs = {
            stream: OutputStream(
                loop, fd, consumed=functools.partial(self._consumed, stream),
                on_broken=self._reader_gone, on_end=self._look,
            )
            for stream, fd in outputs.items()
        }

    def begin(self, job: Job) -> None:
        """``job`` is the agent's side, which has begun."""
        self.job = job
        self.call.when_over = self.abandon
        if self._input is not None:
            self._input.look()

    def kill(self, number: int) -> None:
        """Send a signal to the command; AgentError if there is no such signal."""
        if self.job is not None:
            self.job.kill(number)

    def abandon(self) -> None:
        """The client has gone: kill the command, and drop what it prints."""
        if self._result is None:
            self.kill(signal.SIGKILL)
        if self._input is not None:
            self._input.close()
        for output in self._outputs.values():
            output.drop()

    # For the link

    def on_data(self, stream: int, data: bytes) -> None:
        """See ``JobEvents``."""
        self._outputs[stream].add(data)

    def on_room(self) -> None:
        """See ``JobEvents``."""
        if self._input is not None:
            self._input.look()

    def on_exit(self, result: JobResult) -> None:
        """See ``JobEvents``; the answer follows once the client has taken all output."""
        self._result = result
        if self._input is not None:
            self._input.close()
        for output in self._outputs.values():
            output.end()
        self._look()

    def _consumed(self, stream: int, count: int) -> None:
        if self.job is not None:
            self.job.consumed(stream, count)

    def _reader_gone(self) -> None:
        if self._result is None:
            self.kill(signal.SIGPIPE)

    def _look(self) -> None:
        result = self._result
        if result is None or self._is_over:
            return
        if all(output.has_ended for output in self._outputs.values()):
            self._is_over = True
            self.call.answer({
                "kind": str(result.kind), "value": result.value, "timed_out": result.is_timeout,
                "reason": result.reason,
            })
            self._on_over(self)
