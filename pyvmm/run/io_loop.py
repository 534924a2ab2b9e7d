"""What waits for doorbells: one epoll over file descriptors, a bounded pass for each that rings.

The loop runs in its caller's thread; ``runner.py`` decides which that is.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence

from pyvmm.startup.types import Record

LAST_WAIT_S = 2.0
"""How long all that serve disks, together, may still take once a run or an export ends."""


class IoSource(Record, kw_only=False):
    """A file descriptor to wait for: when it is readable, ``service()`` does one bounded pass.

    It says when to come back: None when nothing is left, else after that many seconds (0: at
    once, for there is more; above 0: the disk is rate-limited).  With ``drain`` only what is new
    counts: the descriptor is an eventfd, whose count nobody needs, or one that stays readable for
    good.  Without, ``service`` reads what makes it readable.
    """

    fd: int
    service: Callable[[], float | None]
    drain: bool = True


class IoLoop:
    """Serves ``sources`` until ``stop`` is called; ``stop_fd`` readable makes it look.

    Every source gets a pass in turn while there is work: none holds up another for longer than
    that.
    """

    def __init__(self, sources: Sequence[IoSource], stop_fd: int = -1) -> None:
        self._by_fd = {source.fd: source.service for source in sources}
        self._poller = select.epoll()
        try:
            for source in sources:
                # Edge-triggered, every write to an eventfd is an event of its own, read or not:
                # draining costs no system call.
                edge = select.EPOLLET if source.drain else 0
                self._poller.register(source.fd, select.EPOLLIN | edge)
            if stop_fd >= 0:
                self._poller.register(stop_fd, select.EPOLLIN)
        except OSError:
            self._poller.close()
            raise
        self._stop_fd = stop_fd
        self._stopping = False

    def stop(self) -> None:
        """From any thread: end ``run`` after the pass under way."""
        self._stopping = True

    def run(self) -> None:
        """Serve in the calling thread until stopped; once."""
        poll, by_fd, stop_fd = self._poller.poll, self._by_fd, self._stop_fd
        most = len(by_fd) + 1
        alone = len(by_fd) == 1
        due_s: dict[int, float] = {}
        with self._poller:
            while not self._stopping:
                if not due_s:
                    # Nearly always.  One has rung, and one pass is enough; or there is more, and
                    # no other source to wait for its turn: no need to poll in between.
                    for fd, _ in poll(None, most):
                        if fd != stop_fd:
                            service = by_fd[fd]
                            delay_s = service()
                            while delay_s == 0.0 and alone and not self._stopping:
                                delay_s = service()
                            if delay_s is not None:
                                due_s[fd] = time.monotonic() + delay_s
                    continue
                wait_s = max(0.0, min(due_s.values()) - time.monotonic())
                for fd, _ in poll(wait_s, most):
                    if fd != stop_fd:
                        due_s[fd] = 0.0
                now_s = time.monotonic()
                for fd in [fd for fd, at_s in due_s.items() if at_s <= now_s]:
                    delay_s = by_fd[fd]()
                    if delay_s is None:
                        del due_s[fd]
                    else:
                        due_s[fd] = now_s + delay_s
