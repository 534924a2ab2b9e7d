"""A client of the control protocol: blocking calls, from any thread."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any

from pyvmm.control.messages import PROTOCOL, LineReader, RequestError, decode, encode
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.peers.unix_socket import connect_unix

HELLO_S = 10.0
MAX_ANSWER_BYTES = 16 << 20
_READ_BYTES = 256 << 10


class ControlError(PyvmmError):
    """A machine in another process refused a request, or cannot be reached.

    ``kind`` is one of docs/control.md's kinds of errors; "closed" if the connection has ended
    without an answer, "timeout" if there is none yet.  ``details`` are the fields that only errors
    of this kind have.
    """

    def __init__(
        self, kind: str, message: str, details: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.details = details


class Pending(Future[dict[str, Any]]):
    """The answer to a request, once it is there: ``result`` returns it or raises ControlError.

    ``id`` is the request's number, by which ``agent.kill`` names it.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.id = number


class Client:
    """A connection to a control server; the methods may be called from any thread.

    ``on_event`` is called with each event, in the client's own thread; if it blocks, the server
    waits, and drops console output in the end.  ``on_end`` is called there once no more can come.
    ``sock`` is the client's from now on.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._on_event, self._on_end = on_event, on_end
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._next_id = 1
        self._is_closed = self._closes_at_end = False
        self._problem = ""
        self._first: Future[dict[str, Any]] = Future()
        """The first event: hello, or the reason why there is no machine."""
        self._thread = threading.Thread(target=self._run, name="control client", daemon=True)
        self._thread.start()

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        on_end: Callable[[], None] | None = None,
        timeout_s: float = HELLO_S,
    ) -> Client:
        """Return a client of the server at ``path``; ControlError if there is none."""
        try:
            sock = connect_unix(path, time.monotonic() + timeout_s)
        except OSError as error:
            raise ControlError("closed", f"{path}: {_no_connection(path, error)}") from error
        client = cls(sock, on_event=on_event, on_end=on_end)
        try:
            client.wait_hello(timeout_s)
        except BaseException:
            client.close()
            raise
        return client

    def wait_hello(self, timeout_s: float | None = HELLO_S) -> dict[str, Any]:
        """Return the server's first event once the machine is built.

        ConfigError or HostError if it could not be built, ControlError if the server says nothing
        in time, hangs up, or speaks another version of the protocol.
        """
        try:
            hello = self._first.result(timeout_s)
        except TimeoutError:
            raise ControlError(
                "timeout", f"the machine's process has said nothing for {timeout_s:g} s"
            ) from None
        if hello.get("event") == "failed":
            raise error_of(hello)
        if hello.get("event") != "hello" or hello.get("protocol") != PROTOCOL:
            raise ControlError(
                "closed", f"it speaks version {hello.get('protocol')} of the control protocol, "
                f"not {PROTOCOL}; use the same pyvmm on both sides"
            )
        return hello

    def begin(
        self, method: str, params: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> Pending:
        """Send a request, with copies of the descriptors ``fds``; return its answer to be."""
        with self._lock:
            pending = Pending(self._next_id)
            self._next_id += 1
            if self._is_closed:
                pending.set_exception(self._closed_error())
                return pending
            self._pending[pending.id] = pending
        message: dict[str, object] = {
            "id": pending.id, "method": method, "params": dict(params or {}),
        }
        if fds:
            message["fds"] = len(fds)
        try:
            self._send(encode(message), fds)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the thread reads why the server hung up, and fails what is under way
        except OSError as error:
            with self._lock:
                is_waiting = self._pending.pop(pending.id, None) is not None
            if is_waiting and not pending.done():
                pending.set_exception(ControlError("closed", f"{method}: {error.strerror}"))
        return pending

    def call(
        self,
        method: str,
        params: Mapping[str, object] | None = None,
        fds: Sequence[int] = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Send a request and return its result; ControlError if it is refused.

        ControlError of kind "timeout" after ``timeout_s`` seconds; the request goes on.
        """
        try:
            return self.begin(method, params, fds).result(timeout_s)
        except TimeoutError:
            raise ControlError("timeout", f"{method}: no answer for {timeout_s:g} s") from None

    @property
    def is_closed(self) -> bool:
        """True once nothing more can come."""
        return self._is_closed

    def close(self) -> None:
        """Hang up; idempotent.  Calls under way raise ControlError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is self._thread:
            self._closes_at_end = True
        else:
            self._thread.join()
            self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # The thread

    def _run(self) -> None:
        lines = LineReader(MAX_ANSWER_BYTES)
        try:
            while data := self._socket.recv(_READ_BYTES):
                lines.feed(data)
                while (line := lines.next_line()) is not None:
                    self._take(decode(line))
        except OSError:
            pass
        except RequestError as error:
            self._problem = f"the server lies: {error}"
        except Exception as error:  # of on_event: a defect of the caller's
            self._problem = f"an event was not taken: {type(error).__name__}: {error}"
        finally:
            with self._lock:
                self._is_closed = True
                pending, self._pending = list(self._pending.values()), {}
            for each in pending:
                each.set_exception(self._closed_error())
            if not self._first.done():
                self._first.set_exception(self._closed_error())
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if self._on_end is not None:
                self._on_end()
            if self._closes_at_end:
                self._socket.close()

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            if not self._first.done():
                self._first.set_result(message)
            if self._on_event is not None:
                self._on_event(message)
            return
        error = message.get("error")
        number = message.get("id")
        if number is None and isinstance(error, dict):  # of no request: the last words
            self._problem = str(error.get("message", ""))
            return
        with self._lock:
            pending = self._pending.pop(number, None) if isinstance(number, int) else None
        if pending is None:
            return
        if isinstance(error, dict):
            kind, words = str(error.pop("kind", "")), str(error.pop("message", ""))
            pending.set_exception(ControlError(kind, words, error))
        else:
            pending.set_result(message.get("result") or {})

    def _closed_error(self) -> ControlError:
        return ControlError(
            "closed", self._problem or "the machine's process has ended the connection"
        )

    def _send(self, line: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with self._sending:
            sent = self._socket.sendmsg([line], rights)
            if sent < len(line):
                self._socket.sendall(line[sent:])


def error_of(event: Mapping[str, Any]) -> PyvmmError:
    """Return the error that a ``failed`` event tells of: ConfigError or HostError."""
    if event.get("kind") == "ConfigError":
        return ConfigError(str(event.get("subject", "")), str(event.get("problem", "")))
    return HostError(str(event.get("message", "")))


def _no_connection(path: str, error: OSError) -> str:
    """Return why there is no connection to ``path``, and what may help."""
    said = str(error.strerror or error)
    if isinstance(error, FileNotFoundError):
        return f"{said}; pyvmm ps lists the machines that run, with their sockets"
    if isinstance(error, ConnectionRefusedError):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                return "is no socket"
        return f"{said}: nobody listens on it any more"
    return said
