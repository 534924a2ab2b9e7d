"""Requests and events on the control socket of a machine, without waiting (docs/control.md).

``Connection`` belongs to a session: one thread calls ``read``; any thread calls ``send``.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from pyvmm.errors import HostError

MAX_LINE_BYTES = 2 << 20
SEND_TIMEOUT_S = 30.0
"""The process of a machine reads requests at any time: one that does not is stopped or hangs."""


class Call:
    """One request; ``answer`` is None until it came."""

    def __init__(self, request: int) -> None:
        self.request = request
        self.answer: dict[str, object] | None = None

    @property
    def result(self) -> dict[str, object]:
        """Return the ``result`` of the answer; empty if it has none."""
        found = (self.answer or {}).get("result")
        return found if isinstance(found, dict) else {}

    @property
    def error(self) -> dict[str, object] | None:
        """Return the ``error`` of the answer; None if it has none."""
        found = (self.answer or {}).get("error")
        return found if isinstance(found, dict) else None


class Connection:
    """The client's end of a control socket, which is non-blocking.

    ``on_event`` gets events; ``on_answer`` is called after a call got its answer.  Both are called
    in the thread that reads.
    """

    def __init__(
        self,
        end: socket.socket,
        *,
        on_event: Callable[[dict[str, object]], None],
        on_answer: Callable[[Call], None],
    ) -> None:
        self._socket = end
        self._on_event = on_event
        self._on_answer = on_answer
        self._lock = threading.Lock()
        self._calls: dict[int, Call] = {}
        self._last = 0
        self._data = bytearray()

    def send(
        self, method: str, params: dict[str, object] | None = None, fds: Sequence[int] = ()
    ) -> Call:
        """Send a request with the descriptors ``fds`` and return it, unanswered.

        OSError if the other end is gone, HostError if it takes nothing.
        """
        with self._lock:
            self._last += 1
            call = Call(self._last)
            self._calls[call.request] = call
            message = {"id": call.request, "method": method, "params": params or {}}
            data = memoryview(json.dumps(message).encode() + b"\n")
            try:
                self._send_all(data, fds)
            except BaseException:
                self._calls.pop(call.request, None)
                raise
        return call

    def _send_all(self, data: memoryview, fds: Sequence[int]) -> None:
        until_s = time.monotonic() + SEND_TIMEOUT_S
        while data:
            try:
                if fds:
                    sent = socket.send_fds(self._socket, [data], list(fds))
                else:
                    sent = self._socket.send(data)
            except BlockingIOError:
                self._wait_for_room(until_s)
                continue
            data, fds = data[sent:], ()

    def _wait_for_room(self, until_s: float) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        if not poller.poll(max(0.0, until_s - time.monotonic()) * 1000):
            raise HostError(
                f"launch: the process of the VM has read no request for {SEND_TIMEOUT_S:g} s"
            )

    def read(self) -> bool:
        """Take what has come, and act on it; False at the end of the connection.

        Also False if the other end breaks the protocol.
        """
        try:
            data = self._socket.recv(256 << 10)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        self._data += data
        *lines, rest = self._data.split(b"\n")
        self._data = rest
        return all(self._take(bytes(line)) for line in lines) and len(rest) <= MAX_LINE_BYTES

    def _take(self, line: bytes) -> bool:
        """Act on a line; False if it is none of the protocol's."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(message, dict):
            return False
        if "event" in message:
            self._on_event(message)
            return True
        call = None
        with contextlib.suppress(TypeError), self._lock:
            call = self._calls.pop(message.get("id", 0), None)
        if call is not None:
            call.answer = message
            self._on_answer(call)
        return True
