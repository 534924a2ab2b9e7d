"""The eventfds between a driver and a device outside this process."""

from __future__ import annotations

import contextlib
import os
import select

from pyvmm.driver.errors import TransportError


class QueueEventFds:
    """A kick and a call eventfd for each of a device's queues; none before ``open``.

    They do not block.  The back end shares them and can clear O_NONBLOCK.  If it also fills the
    counter, our next write blocks (``pyvmm.peers.eventfds``).  So a kick is written only where
    there is room at that moment.
    """

    def __init__(self) -> None:
        self.kicks: list[int] = []
        self.calls: list[int] = []
        self._room: list[select.poll] = []

    def open(self, count: int) -> None:
        """Make new eventfds for ``count`` queues in place of the old ones; TransportError."""
        self.close()
        try:
            for fds in (self.kicks, self.calls):
                for _ in range(count):
                    fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            for fd in self.kicks:
                self._room.append(select.poll())
                self._room[-1].register(fd, select.POLLOUT)
        except OSError as error:
            self.close()
            raise TransportError(f"eventfds of {count} queues: {error.strerror}") from error

    def notify(self, index: int) -> None:
        """Kick the device: queue ``index`` has new requests.

        A full eventfd is left alone, because the device knows already.  Between the look and the
        write the device could fill it.  Then this waits until a signal comes.
        """
        fd = self.kick(index)
        if self._room[index].poll(0):
            with contextlib.suppress(BlockingIOError, InterruptedError):
                os.eventfd_write(fd, 1)

    def kick(self, index: int) -> int:
        """Return the eventfd that notifies the device of queue ``index``; TransportError if
        none."""
        return _one(self.kicks, index)

    def call(self, index: int) -> int:
        """Return the eventfd by which queue ``index`` interrupts; TransportError if none."""
        return _one(self.calls, index)

    def close(self) -> None:
        """Close them all; idempotent."""
        for fd in (*self.kicks, *self.calls):
            os.close(fd)
        self.kicks.clear()
        self.calls.clear()
        self._room.clear()


def _one(fds: list[int], index: int) -> int:
    if not 0 <= index < len(fds):
        raise TransportError(f"queue {index} is not set up; there are {len(fds)}")
    return fds[index]
