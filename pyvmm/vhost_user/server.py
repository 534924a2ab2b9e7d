"""The listening side of an export: front ends come and go, one thread serves them all.

One epoll has everything: the listening socket, the connections and the rings' kick eventfds.  The
kicks are edge-triggered: every write to one is an event of its own, whether it is read or not.  So
there is no other system call between a kick and the pass over its ring.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable

from pyvmm.errors import PeerClosedError, VhostUserError
from pyvmm.peers.eventfds import EventfdWriter
from pyvmm.vhost_user.channel import Channel
from pyvmm.vhost_user.listener import Listener
from pyvmm.vhost_user.session import Session
from pyvmm.virtio.device import VirtioDevice

MAX_FRONTENDS = 64
"""Simultaneous connections to a disk that many may read."""
_ACCEPT_PAUSE_S = 1.0
_NEVER_S = float("inf")
_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid


class Server:
    """Serves a device of ``make_device`` to every front end that connects to ``path``.

    With ``exclusive`` there is one front end at a time, because two that write to one disk destroy
    its file system.  ``report`` takes lines about a front end's mistakes, ``note`` those about
    front ends that come and go.  ConfigError if ``path`` cannot be listened on.

    All work is done in ``service``, called when ``fileno`` is readable.  The server and everything
    that it serves belong to one thread.  A wicked front end can make that thread wait in a write of
    ``eventfd_writer``.  Another thread watches the writes, and ends the write and the connection.
    """

    def __init__(
        self,
        path: str,
        make_device: Callable[[], VirtioDevice],
        *,
        exclusive: bool,
        report: Callable[[str], None],
        note: Callable[[str], None] = lambda line: None,
        trust_memory: bool = False,
        eventfd_writer: EventfdWriter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.eventfd_writer = eventfd_writer or EventfdWriter()
        self._make_device = make_device
        self._max_frontends = 1 if exclusive else MAX_FRONTENDS
        self._report = report
        self._note = note
        self._trust_memory = trust_memory
        self._clock = clock
        self._sessions: dict[int, Session] = {}
        self._serve: dict[int, Callable[[], float | None]] = {}
        """By kick eventfd: the pass over its ring."""
        self._due_s: dict[int, float] = {}
        """By kick eventfd: the time of the next pass."""
        self._unfinished: set[Session] = set()
        """Sessions in the middle of a message."""
        self._accept_at_s = _NEVER_S
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(contextlib.closing(Listener(path)))
            self._poller = stack.enter_context(contextlib.closing(select.epoll()))
            self._poller.register(self._listener.fileno(), select.EPOLLIN)
            stack.pop_all()

    def fileno(self) -> int:
        """Readable when ``service`` has something to do."""
        return self._poller.fileno()

    def service(self) -> float | None:
        """Do a bounded amount of work, on the caller's thread; never waits.

        Returns when to call again: None once ``fileno`` is readable, else after that many seconds
        at the latest.
        """
        due_s, serve = self._due_s, self._serve
        wants_in = False
        for fd, _ in self._poller.poll(0):
            # An event may be about a descriptor that was closed since, or even about a new one of
            # the same number.  In that case a pass finds nothing to do.
            if fd in serve:
                due_s[fd] = 0.0
            elif fd in self._sessions:
                self._attempt(self._sessions[fd], Session.receive)
            else:
                wants_in = wants_in or fd == self._listener.fileno()
        now_s = self._clock()
        if wants_in or now_s >= self._accept_at_s:
            self._accept(now_s)
        # Every ring gets one bounded pass in turn while there is work.
        for fd in list(due_s):
            if fd in due_s and due_s[fd] <= now_s:  # it may be gone with its connection
                delay_s = serve[fd]()
                if delay_s is not None:
                    due_s[fd] = now_s + delay_s
                else:
                    due_s.pop(fd, None)
        if due_s or self._unfinished or self._accept_at_s < _NEVER_S:
            return self._next_call_s(now_s)
        return None

    def config_changed(self) -> None:
        """Tell every front end that the device has a new configuration space: the disk has
        grown."""
        for session in self._sessions.values():
            session.config_changed()

    def close(self) -> None:
        """Hang up on every front end and remove the socket; idempotent."""
        for session in list(self._sessions.values()):
            self._drop(session)
        if not self._poller.closed:
            self._poller.close()
        self._listener.close()

    # KickWatcher: see ``backend.KickWatcher``

    def watch(self, fd: int, serve: Callable[[], float | None]) -> None:
        """See ``KickWatcher.watch``."""
        self._poller.register(fd, select.EPOLLIN | select.EPOLLET)
        self._serve[fd] = serve
        self._due_s[fd] = 0.0  # requests already in the ring may never be announced again

    def unwatch(self, fd: int) -> None:
        """See ``KickWatcher.unwatch``."""
        del self._serve[fd]
        self._due_s.pop(fd, None)
        self._poller.unregister(fd)

    # Connections

    def _accept(self, now_s: float) -> None:
        """Let one front end in."""
        if self._accept_at_s < _NEVER_S:
            self._accept_at_s = _NEVER_S
            self._poller.register(self._listener.fileno(), select.EPOLLIN)
        try:
            sock, _ = self._listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # For example out of file descriptors: the caller stays in the queue, and would be an
            # event again and again.
            self._report(f"{self._listener.path}: nobody is let in for now: {error.strerror}")
            self._poller.unregister(self._listener.fileno())
            self._accept_at_s = now_s + _ACCEPT_PAUSE_S
            return
        name = f"{self._listener.path}: front end (pid {_pid_of(sock)})"
        if len(self._sessions) >= self._max_frontends:
            self._drop_hung_up()
        if len(self._sessions) >= self._max_frontends:
            self._report(f"{name} is turned away: {self._users()}")
            sock.close()
            return
        try:
            session = self._begin(sock, name)
        except OSError as error:  # for example out of file descriptors
            self._report(f"{name} is turned away: {error.strerror}")
            return
        self._sessions[session.fileno()] = session
        self._note(f"{name} connected")

    def _begin(self, sock: socket.socket, name: str) -> Session:
        """Return a session with the peer of ``sock``; an OSError closes ``sock``."""
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            channel = Channel(sock, peer=name)
            stack.callback(channel.close)
            session = Session(
                channel,
                self._make_device(),
                self,
                report=self._report,
                trust_memory=self._trust_memory,
                clock=self._clock,
            )
            stack.callback(session.close)
            self._poller.register(session.fileno(), select.EPOLLIN)
            stack.pop_all()
        return session

    def _users(self) -> str:
        """Return words for the connected front ends."""
        if len(self._sessions) > 1:
            return f"{len(self._sessions)} front ends use the disk"
        (session,) = self._sessions.values()
        return f"{session.name.removeprefix(f'{self._listener.path}: ')} uses the disk"

    def _attempt(self, session: Session, step: Callable[[Session], None]) -> None:
        """Do ``step`` of ``session``; if that ends the connection, end it."""
        try:
            step(session)
        except VhostUserError as error:
            is_farewell = isinstance(error, PeerClosedError) and not session.is_mid_message
            say = self._note if is_farewell else self._report
            say(str(error))
        else:
            if session.is_mid_message:
                self._unfinished.add(session)
            else:
                self._unfinished.discard(session)
            return
        # Outside the handler, where the traceback no longer holds views of the memory.
        self._drop(session)

    def _drop_hung_up(self) -> None:
        """Notice at once the front ends that have hung up; their events would come later.

        Otherwise a VMM that ends and starts again would be turned away because of itself.
        """
        poller = select.poll()
        for fd in self._sessions:
            poller.register(fd, select.POLLRDHUP)
        for fd, _ in poller.poll(0):
            session = self._sessions[fd]
            self._note(f"{session.name} has hung up")
            self._drop(session)

    def _drop(self, session: Session) -> None:
        fd = session.fileno()
        del self._sessions[fd]
        self._unfinished.discard(session)
        self._poller.unregister(fd)
        session.close()

    def _next_call_s(self, now_s: float) -> float | None:
        for session in list(self._unfinished):
            self._attempt(session, Session.check_deadline)
        at_s = min([self._accept_at_s, *self._due_s.values()])
        for session in self._unfinished:
            at_s = min(at_s, session.deadline_s)
        return max(0.0, at_s - now_s) if at_s < _NEVER_S else None


def _pid_of(sock: socket.socket) -> int:
    """Return the process that connected; 0 if it is not in this process's namespace."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(raw)[0]
    return pid
