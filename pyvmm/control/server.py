"""The control server: a thread of ``pyvmm run`` that serves clients at Unix sockets."""

from __future__ import annotations

import base64
import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable

from pyvmm.control.connection import Call, Connection
from pyvmm.control.messages import PROTOCOL, Params, RequestError, encode, shorten
from pyvmm.control.methods import METHODS
from pyvmm.control.saves import Rewound
from pyvmm.control.session import Session, ended_event
from pyvmm.control.target import Target
from pyvmm.errors import PyvmmError
from pyvmm.run.io_loop import IoLoop, IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.vhost_user.listener import Listener

MAX_CLIENTS = 16
LINGER_S = 2.0
"""Seconds after the run in which clients may take what waits for them."""
OWNER_LINGER_S = 10.0
"""The same if there is an owner: after a short run it may not have subscribed yet."""
JOIN_S = 5.0
ACCEPT_PAUSE_S = 0.5
WORK_S = 600.0
"""Seconds that a snapshot may still take once the run has ended."""
EVENTS = ("console", "state", "ended", "rewound")
CONSOLE_EVENT_BYTES = 32 << 10
CONSOLE_BACKLOG_BYTES = 128 << 10
"""So much of the console waits at a client's socket; the rest waits where all clients share it."""


class Subscription:
    """The events that a client has asked for, and its position in the console."""

    def __init__(self, events: frozenset[str], position: int) -> None:
        self.events = events
        self.position = position
        self.knows_the_end = False
        self.owes_state = False
        """True if the state has changed and the client had no room to be told."""


class Server:
    """Serves ``target`` to the clients of ``listener``, and to ``owner``, whose end stops the run.

    Its thread runs from ``start`` to ``close``.  ``end`` and ``close`` are called by the thread
    that owns the run.  ``report`` takes lines for the user.
    """

    def __init__(
        self,
        target: Target,
        *,
        listener: Listener | None = None,
        owner: socket.socket | None = None,
        report: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._owner = owner
        self._linger_s = LINGER_S if owner is None else OWNER_LINGER_S
        self._report = report
        self._subscriptions: dict[Connection, Subscription] = {}
        """All connected clients."""
        self._ended: dict[str, object] | None = None
        """The event of the end, from the thread that owns the run."""
        self._is_ending = self._knows_end = False
        self._ends: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """For the thread that owns the run: True, its end was taken back; False, all is told."""
        self._taking_back = threading.Lock()
        self._loop = IoLoop(woken=self._look)
        self._session = Session(
            target, self._loop, tell=self._tell, take_back=self._take_back, idle=self._loop.wake
        )
        target.observe(self._hear, self._loop.wake)
        self._doorway = None if listener is None else IoSource(
            listener.fileno(), self._accept, edge_triggered=False
        )
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Begin to serve, in a thread of its own."""
        self._thread.start()

    def end(self, outcome: Outcome) -> bool:
        """The run has ended: tell all clients, and wait a little until they have taken it.

        True if one of them has rewound the machine: its run goes on.  An owner may do so until it
        goes away, so for a machine that can be rewound it is waited for as long.
        """
        event = ended_event(self._session.target, outcome)
        with self._taking_back:
            if self._ends.empty():  # else the machine has left this end behind already
                self._ended = event
        self._loop.wake()
        while True:
            try:
                return self._ends.get(timeout=self._linger_s + JOIN_S)
            except queue.Empty:
                if not self._is_held:
                    return False

    def close(self) -> None:
        """Stop serving; idempotent."""
        self._session.worker.join(WORK_S)
        if self._thread.is_alive():
            self._loop.stop()
            self._thread.join(JOIN_S)
        elif self._thread.ident is None:
            self._loop.close()

    @property
    def requests_under_way(self) -> int:
        """The number of requests that are not answered yet, of all clients together."""
        return sum(len(connection.calls) for connection in list(self._subscriptions))

    # The thread

    def _run(self) -> None:
        try:
            if self._doorway is not None:
                self._loop.add(self._doorway)
            if self._owner is not None:
                self._connect(self._owner, is_owner=True)
            self._loop.run()
        except Exception as error:  # the guest goes on, whatever a client brings about
            self._report(f"--control: internal error: {type(error).__name__}: {error}")
        for connection in list(self._subscriptions):
            connection.close()
        self._loop.close()
        self._ends.put(False)

    def _look(self) -> None:
        """Look at all that other threads have brought."""
        self._session.look()
        for connection in list(self._subscriptions):
            self._pump(connection)
        if self._ended is not None and not self._knows_end:
            self._knows_end = True
            self._session.end(self._ended)
            for connection in list(self._subscriptions):
                connection.take_requests()  # a wait that was sent just before is answered, too
                self._pump(connection)
        if self._knows_end and not (self._is_ending or self._is_held):
            self._is_ending = True
            self._finish()

    @property
    def _is_held(self) -> bool:
        """True while the ended machine may be needed."""
        saves = self._session.target.saves
        has_owner = any(connection.is_owner for connection in list(self._subscriptions))
        return self._session.worker.is_busy or (
            has_owner and saves is not None and saves.can_rewind
        )

    def _take_back(self, rewound: Rewound) -> None:
        """The machine was rewound; an end that it had is none any more."""
        if not rewound.had_ended:
            return
        with self._taking_back:
            self._ended = None
            self._ends.put(True)
        self._knows_end = False
        for subscription in self._subscriptions.values():
            subscription.knows_the_end = False

    def _finish(self) -> None:
        if self._listener is not None and self._doorway is not None:
            self._loop.remove(self._doorway)
            self._listener.close()
        self._loop.call_in(LINGER_S, self._close_stuck)
        self._loop.call_in(self._linger_s, self._loop.stop)
        for connection in list(self._subscriptions):
            connection.take_requests()
            # A client that takes all of the console hears of the end behind it.
            self._pump(connection)
        self._stop_when_idle()

    def _stop_when_idle(self) -> None:
        """Close each client that has taken all, and stop once there is none."""
        if not self._is_ending:
            return
        for connection, subscription in list(self._subscriptions.items()):
            # An owner that does not know yet subscribes soon: it must not miss the end.
            needs_no_end = "ended" not in subscription.events and not connection.is_owner
            if (subscription.knows_the_end or needs_no_end) and not connection.calls:
                connection.finish()
        if not self._subscriptions:
            self._loop.stop()

    def _close_stuck(self) -> None:
        for connection in list(self._subscriptions):
            if not connection.is_owner:
                connection.close()

    # Clients

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._doorway is not None
        doorway = self._doorway
        try:
            client, _ = self._listener.socket.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors are left: do not try again at once
            self._loop.remove(doorway)
            self._loop.call_in(ACCEPT_PAUSE_S, lambda: self._loop.add(doorway))
            return
        if len(self._subscriptions) < MAX_CLIENTS:
            self._connect(client)
            return
        with client, contextlib.suppress(OSError):
            client.setblocking(False)
            client.send(encode({"id": None, "error": {
                "kind": "limit", "message": f"{MAX_CLIENTS} clients are connected already",
            }}))

    def _connect(self, client: socket.socket, *, is_owner: bool = False) -> None:
        connection = Connection(
            self._loop, client, serve=self._serve, on_room=self._on_room, on_gone=self._gone,
            is_owner=is_owner,
        )
        self._subscriptions[connection] = Subscription(frozenset(), 0)
        connection.send({
            "event": "hello", "protocol": PROTOCOL, "pid": os.getpid(),
            "pyvmm": self._session.target.facts["pyvmm"],
        })

    def _gone(self, connection: Connection) -> None:
        del self._subscriptions[connection]
        if connection.is_owner and not self._is_ending:
            self._session.target.finish(
                Outcome(Kind.STOPPED, detail="the process behind --control-fd has gone")
            )
        if self._is_ending and not self._subscriptions:
            self._loop.stop()
        self._loop.wake()  # an owner held the end

    def _serve(self, call: Call, params: Params) -> None:
        if call.method == "subscribe":
            self._subscribe(call, params)
            return
        if call.method == "status":  # whoever has its answer has had all that was printed before
            self._pump(call.connection)
        method = METHODS.get(call.method)
        if method is None:
            raise RequestError(
                "method", f"{shorten(call.method)} is no method; there are "
                f"{', '.join(('subscribe', *METHODS))}"
            )
        try:
            method(self._session, call, params)
        except RequestError:
            raise
        except (PyvmmError, OSError, RuntimeError) as error:
            raise RequestError("host", f"{call.method}: {error}") from error

    # Events

    def _hear(self, data: bytes) -> None:
        """Take what the guest printed; in the thread that keeps house."""
        self._session.console.feed(data)
        self._loop.wake()

    def _subscribe(self, call: Call, params: Params) -> None:
        events = params.texts("events", 100, least=1)
        for event in events:
            if event not in EVENTS:
                raise params.error(
                    "events", f"has {shorten(event)}; there are {', '.join(EVENTS)}"
                )
        end = self._session.console.end
        position = params.integer("console_from", 0, 1 << 62, end)
        params.end()
        if position > end:
            raise params.error("console_from", f"must be at most {end}, the console's end")
        self._subscriptions[call.connection] = Subscription(frozenset(events), position)
        call.answer({
            "at": position, "paused": self._session.target.is_paused,
            **self._session.agent.state(), **self._session.clone_state(),
        })
        self._pump(call.connection)

    def _tell(self, event: dict[str, object]) -> None:
        for connection, subscription in list(self._subscriptions.items()):
            if event["event"] in subscription.events:
                # A guest may change it without end: a client that does not read gets the last one.
                is_owed = event["event"] == "state" and connection.backlog >= CONSOLE_BACKLOG_BYTES
                subscription.owes_state = subscription.owes_state or is_owed
                if not subscription.owes_state or event["event"] != "state":
                    connection.send(event)

    def _on_room(self, connection: Connection) -> None:
        self._pump(connection)
        self._stop_when_idle()

    def _pump(self, connection: Connection) -> None:
        """Send ``connection`` more of the console, while it takes it, and then the end."""
        subscription = self._subscriptions.get(connection)
        if subscription is None:
            return
        if subscription.owes_state and connection.backlog < CONSOLE_BACKLOG_BYTES:
            subscription.owes_state = False
            connection.send(self._session.state())
        is_all = "console" not in subscription.events
        while not is_all and not connection.is_closed:
            if connection.backlog >= CONSOLE_BACKLOG_BYTES:
                return
            at, data = self._session.console.read(subscription.position, CONSOLE_EVENT_BYTES)
            if lost := at - subscription.position:
                connection.send({"event": "console.lost", "bytes": lost})
            subscription.position = at + len(data)
            is_all = not data
            if data:
                connection.send(
                    {"event": "console", "at": at, "data": base64.b64encode(data).decode()}
                )
        ended = self._session.ended
        if ended is not None and "ended" in subscription.events and not subscription.knows_the_end:
            subscription.knows_the_end = True
            connection.send(ended)

