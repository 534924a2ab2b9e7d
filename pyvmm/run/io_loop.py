"""The loop of every thread that waits for file descriptors: doorbells, consoles, signals, times.

``IoLoop.run`` serves in its caller's thread.  One epoll waits for all sources, and each source that
is ready gets one bounded pass.  Requests of other threads arrive through one eventfd, a source like
any other.  So they cost a pass nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
import time
from collections.abc import Callable, Sequence

from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    Service = Callable[[], float | None]

LAST_WAIT_S = 2.0
"""Seconds that all sources of disks together may still take once a run or an export ends."""
EVENTS_A_WAIT = 16
"""Ready descriptors that one wait returns; epoll returns the rest first the next time."""
LONGEST_WAIT_S = 86400.0
"""epoll_wait takes a C int of milliseconds: 24 days."""
_ALWAYS_READY = (errno.EPERM, errno.EBADF)
"""epoll refuses regular files, /dev/null and closed descriptors; poll(2) calls them ready."""


class IoSource(Record, kw_only=False):
    """A file descriptor to wait for: when it is ready, ``service()`` does one bounded pass.

    The service returns when to call it again: None when it has nothing left to do, 0 at once, else
    the delay in seconds (a rate limit).  ``edge_triggered`` makes each new event one wake-up and
    leaves the descriptor unread: for an eventfd, or for a socket that stays readable for good.
    Without it, ``service`` must read what makes the descriptor readable.  ``is_output`` waits for
    room to write instead of something to read.  Each source has a service of its own.
    """

    fd: int
    service: Service
    edge_triggered: bool = True
    is_output: bool = False


class Deadline:
    """A call that a loop makes once, at a time; see ``IoLoop.call_at``."""

    __slots__ = ("_action", "_forget")

    def __init__(self, action: Callable[[], None], forget: Callable[[Deadline], None]) -> None:
        self._action = action
        self._forget = forget

    def __call__(self) -> None:
        self._action()

    def cancel(self) -> None:
        """Forget the call; nothing if it was made.  Another thread may come too late."""
        self._forget(self)


class IoLoop:
    """Serves its sources until ``stop`` is called.

    Every source gets a pass in turn while there is work: none holds up another for longer than
    that.  All methods but ``run`` and ``close`` may be called from any thread, and from a signal
    handler if they do not wait.

    ``wake_fd`` is a non-blocking eventfd that may belong to several loops: writing it makes each of
    them look for requests of other threads.  Without one, the loop makes its own.  ``woken`` is
    called in the loop's thread at the start and after each ``wake``.
    """

    def __init__(
        self,
        sources: Sequence[IoSource] = (),
        wake_fd: int = -1,
        *,
        woken: Callable[[], None] | None = None,
    ) -> None:
        self._woken = woken
        # Re-entrant: a signal's handler may stop a loop whose own thread holds the lock.
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        """The loop has parked, may go on, or has answered a request."""
        self._sources: dict[tuple[int, bool], IoSource] = {}
        """By descriptor and ``is_output``."""
        self._by_fd: dict[int, Service] = {}
        """The services of descriptors with one source; those with two are looked up above."""
        self._always_ready: set[Service] = set()
        self._due_s: dict[Service, float] = {}
        """When to call whom, on time.monotonic; only the loop's thread changes it."""
        self._requests: list[Callable[[], object]] = []
        self._ident = 0
        """The thread in ``run``; 0 before and afterwards."""
        self._stopping = False
        self._may_stay = False
        """True if a lone source with more to do may be served on without a wait in between."""
        self._park_is_wanted = self._is_parked = False
        self._poller = select.epoll()
        self._wake_fd, self._owns_wake_fd = wake_fd, wake_fd < 0
        try:
            if self._owns_wake_fd:
                self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            for source in (IoSource(self._wake_fd, self._look), *sources):
                self.add(source)
        except OSError:
            self.close()
            raise

    # Sources and times

    def add(self, source: IoSource) -> None:
        """Wait for ``source`` too; ValueError if its descriptor has such a source already."""
        with self._lock:
            key = source.fd, source.is_output
            other = self._sources.get((source.fd, not source.is_output))
            if self._poller.closed:
                raise ValueError(f"descriptor {source.fd}: the loop has ended")
            if key in self._sources:
                raise ValueError(f"descriptor {source.fd} has a source already")
            if other is not None and (source.edge_triggered or other.edge_triggered):
                raise ValueError(f"descriptor {source.fd}: two sources cannot be edge-triggered")
            self._sources[key] = source
            try:
                is_known = other is not None and other.service not in self._always_ready
                self._register(source.fd, is_new=not is_known)
            except OSError as error:
                if source.edge_triggered or error.errno not in _ALWAYS_READY:
                    del self._sources[key]
                    self._by_fd.pop(source.fd, None)
                    raise
                self._always_ready.add(source.service)
                self._request(lambda: self._due_s.setdefault(source.service, 0.0))

    def remove(self, source: IoSource) -> None:
        """Wait for ``source`` no more; nothing if it is not waited for.

        When this returns, no pass of ``source`` is under way, but for the caller's own.  So a call
        from another thread waits for the end of the loop's present pass.
        """
        self.do_between_passes(lambda: self._forget_source(source), None)

    def do_between_passes(
        self, action: Callable[[], None], timeout_s: float | None = None
    ) -> bool:
        """Have ``action`` done in the loop's thread and wait; return True once it was.

        In that very thread, or if no thread runs the loop, do ``action`` at once.
        """
        done: list[bool] = []

        def act() -> None:
            action()
            done.append(True)
            with self._lock:
                self._news.notify_all()

        with self._lock:
            if self._ident in (0, threading.get_ident()):
                action()
                return True
            self._add_request(act)
            return self._news.wait_for(lambda: bool(done), timeout_s)

    def wait_for_pass(self, timeout_s: float | None) -> bool:
        """Wait for the end of the pass under way; False after ``timeout_s`` seconds."""
        return self.do_between_passes(lambda: None, timeout_s)

    def call_at(self, at_s: float, action: Callable[[], None]) -> Deadline:
        """Call ``action`` in the loop's thread at ``at_s`` (time.monotonic) or soon after."""
        deadline = Deadline(action, self._cancel)
        self._request(lambda: self._due_s.__setitem__(deadline, at_s))
        return deadline

    def call_in(self, delay_s: float, action: Callable[[], None]) -> Deadline:
        """Call ``action`` in the loop's thread in ``delay_s`` seconds or soon after."""
        return self.call_at(time.monotonic() + delay_s, action)

    def call_soon(self, action: Callable[[], None]) -> None:
        """Call ``action`` in the loop's thread, between two passes."""
        self.call_at(0.0, action)

    # Parking and ending

    def begin_park(self) -> None:
        """Ask the loop to park between two passes; does not wait."""
        with self._lock:
            self._park_is_wanted = True
        self._add_request(lambda: None)

    def wait_until_parked(self, timeout_s: float | None) -> bool:
        """Wait until no pass is under way and none will begin; return True then.

        A loop that is not in ``run`` counts as parked: it will park before its first pass.  False
        after ``timeout_s`` seconds, or if somebody resumes it.  RuntimeError in its own thread.
        """
        if threading.get_ident() == self._ident:
            raise RuntimeError("a loop cannot wait for itself to park: use another thread")

        def is_quiet() -> bool:
            return self._is_parked or not self._ident

        with self._lock:
            self._news.wait_for(lambda: not self._park_is_wanted or is_quiet(), timeout_s)
            return self._park_is_wanted and is_quiet()

    def park(self, timeout_s: float | None = None) -> bool:
        """Ask the loop to park and wait until it has: see ``wait_until_parked``.

        Should it take too long, the loop still parks after the pass under way.
        """
        if threading.get_ident() == self._ident:
            raise RuntimeError("a loop cannot wait for itself to park: use another thread")
        self.begin_park()
        return self.wait_until_parked(timeout_s)

    def resume(self) -> None:
        """Let a parked loop go on; nothing if it is not parked."""
        with self._lock:
            self._park_is_wanted = False
            self._news.notify_all()

    def wake(self) -> None:
        """Have ``woken`` called in the loop's thread."""
        with self._lock:  # so that the descriptor is still ours
            if self._wake_fd >= 0:
                with contextlib.suppress(BlockingIOError):  # a full counter has woken the loop
                    os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """End ``run`` after the pass under way, a parked one too."""
        self._stopping = True
        self._add_request(lambda: None)

    def close(self) -> None:
        """Release what the loop made for itself; idempotent.  ``run`` does it at its end."""
        with self._lock:
            self._poller.close()
            for kept in (self._sources, self._by_fd, self._due_s, self._always_ready):
                kept.clear()
            if self._owns_wake_fd and self._wake_fd >= 0:
                os.close(self._wake_fd)
            self._wake_fd = -1

    # The loop's thread

    def run(self) -> None:
        """Serve in the calling thread until stopped; once."""
        with self._lock:
            self._ident = threading.get_ident()
        try:
            self._look()
            self._serve()
        finally:
            with self._lock:
                self._ident = 0
                self._is_parked = False
                # Whoever waits for its request must not wait for ever.
                self._answer_requests()
                self._news.notify_all()
                self.close()

    def _serve(self) -> None:
        # Every name of the loop is bound here: each pass would look it up again.
        poll, service_of, due_s, now = (
            self._poller.poll, self._by_fd.get, self._due_s, time.monotonic
        )
        while not self._stopping:
            if not due_s:
                # Nearly always.  One doorbell has rung, and one pass is enough; or there is more
                # to do, and no other source waits for its turn: no need to poll in between.
                for fd, events in poll(None, EVENTS_A_WAIT):
                    service = service_of(fd)
                    if service is None:
                        self._serve_both_ways(fd, events)
                        continue
                    delay_s = service()
                    while delay_s == 0.0 and self._may_stay:
                        delay_s = service()
                    if delay_s is not None and service_of(fd) is service:
                        due_s[service] = now() + delay_s
                continue
            wait_s = min(due_s.values()) - now()
            wait_s = min(wait_s, LONGEST_WAIT_S) if wait_s > 0.0 else 0.0
            for fd, events in poll(wait_s, EVENTS_A_WAIT):
                service = service_of(fd)
                if service is None:
                    self._serve_both_ways(fd, events)
                else:
                    due_s[service] = 0.0
            now_s = now()
            for service in [service for service, at_s in due_s.items() if at_s <= now_s]:
                if service not in due_s:
                    continue  # a service before this one has cancelled or removed it
                delay_s = service()
                if service not in due_s:
                    continue  # it has removed itself
                if delay_s is not None:
                    due_s[service] = now_s + delay_s
                elif service in self._always_ready:
                    due_s[service] = 0.0
                else:
                    del due_s[service]

    def _serve_both_ways(self, fd: int, events: int) -> None:
        """Have the sources of ``fd`` served soon: it has two, or was just removed."""
        for is_output, other in ((False, select.EPOLLOUT), (True, select.EPOLLIN)):
            source = self._sources.get((fd, is_output))
            if source is not None and events & ~other:
                self._due_s[source.service] = 0.0

    def _look(self) -> None:
        """Answer the requests of other threads, and park if a park was asked for."""
        with self._lock:
            # Before the requests: one that comes later has its own event, and clears it again.
            self._may_stay = len(self._sources) <= 2
        self._answer_requests()
        with self._lock:
            while self._park_is_wanted and not self._stopping:
                self._is_parked = True
                self._news.notify_all()
                self._news.wait_for(
                    lambda: not self._park_is_wanted or self._stopping or self._requests
                )
                self._answer_requests()
            self._is_parked = False
        if self._woken is not None and not self._stopping:
            self._woken()

    def _answer_requests(self) -> None:
        while self._requests:
            self._requests.pop(0)()

    # Helpers

    def _request(self, action: Callable[[], object]) -> None:
        """Call ``action`` where it may change ``_due_s``: at once in the loop's own thread."""
        if threading.get_ident() == self._ident:
            action()
        else:
            self._add_request(action)

    def _add_request(self, action: Callable[[], object]) -> None:
        self._requests.append(action)
        self._may_stay = False
        self.wake()
        with self._lock:
            self._news.notify_all()

    def _register(self, fd: int, *, is_new: bool) -> None:
        """Have epoll wait for the events that the sources of ``fd`` need; under the lock."""
        found = [
            source for is_output in (False, True)
            if (source := self._sources.get((fd, is_output))) is not None
        ]
        mask = 0
        for source in found:
            mask |= select.EPOLLOUT if source.is_output else select.EPOLLIN
            # Edge-triggered, every write to an eventfd is an event of its own, read or not: no
            # system call is needed to take it back.
            mask |= select.EPOLLET if source.edge_triggered else 0
        # Before the event can come.  A descriptor with two sources is not here: see _serve.
        if len(found) == 1:
            self._by_fd[fd] = found[0].service
        else:
            self._by_fd.pop(fd, None)
        self._may_stay = False
        if self._poller.closed:
            return
        if not found:
            with contextlib.suppress(OSError):  # already closed by its owner
                self._poller.unregister(fd)
        elif is_new:
            self._poller.register(fd, mask)
        else:
            self._poller.modify(fd, mask)

    def _forget_source(self, source: IoSource) -> None:
        """Stop waiting for ``source``; in the loop's thread, or while no thread runs the loop."""
        with self._lock:
            if self._sources.get((source.fd, source.is_output)) is not source:
                return
            del self._sources[source.fd, source.is_output]
            self._due_s.pop(source.service, None)
            if source.service in self._always_ready:
                self._always_ready.discard(source.service)
                self._by_fd.pop(source.fd, None)
            else:
                self._register(source.fd, is_new=False)

    def _cancel(self, deadline: Deadline) -> None:
        self._request(lambda: self._due_s.pop(deadline, None))
