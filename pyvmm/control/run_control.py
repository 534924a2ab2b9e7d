"""``--control`` and ``--control-fd`` of ``pyvmm run``: from the option to a server and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable

from pyvmm.config import RunConfig
from pyvmm.control.messages import encode
from pyvmm.control.server import Server
from pyvmm.control.target import MachineTarget
from pyvmm.errors import ConfigError
from pyvmm.machine import Machine
from pyvmm.run.outcome import Outcome
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.vhost_user.listener import Listener


class RunControl:
    """The control of one run; a context manager.

    The socket at ``path`` is there from now on, and its clients are served from ``attach`` on.
    ``fd`` is the text of ``--control-fd``; ``version`` is pyvmm's.  ConfigError if one of them
    cannot be used.
    """

    def __init__(self, path: str | None, fd: str | None, version: str) -> None:
        self._version = version
        self._owner = None if fd is None else owner_socket(fd)
        self._watch = None if self._owner is None else OwnerWatch(self._owner)
        self._listener: Listener | None = None
        self._server: Server | None = None
        if path is not None:
            from pyvmm.vhost_user.listener import Listener  # its imports take a start 10 ms

            try:
                self._listener = Listener(path)
            except ConfigError as error:
                self.__exit__()
                raise ConfigError(f"--control {path}", error.problem) from error

    def attach(
        self, machine: Machine, config: RunConfig, report: Callable[[str], None], *,
        sets_clock: bool = False,
    ) -> None:
        """Serve ``machine``, which has not run yet.

        With ``sets_clock`` the agent of a clone sets its guest's date to this host's.
        """
        facts: dict[str, object] = {
            "pyvmm": self._version,
            "kernel": os.fspath(config.kernel),
            "disks": [disk.location for disk in config.disks],
            "memory_bytes": config.memory_bytes,
            "agent_way": config.agent,
        }
        self._end_watch()
        self._server = Server(
            MachineTarget(machine, facts, sets_clock=sets_clock), listener=self._listener,
            owner=self._owner, report=report,
        )
        self._server.start()

    def end(self, outcome: Outcome) -> bool:
        """Tell all clients that the run has ended with ``outcome``; the machine is not closed.

        True if one of them has rewound the machine: its run goes on.
        """
        return self._server is not None and self._server.end(outcome)

    def failed(self, error: Exception) -> None:
        """Tell the owner that there was no run, because of ``error``."""
        if self._owner is None or self._server is not None:
            return
        self._end_watch()  # an owner that has its answer may go; we have lines to print yet
        is_config = isinstance(error, ConfigError)
        event = {
            "event": "failed", "kind": "ConfigError" if is_config else "HostError",
            "message": str(error),
        }
        if isinstance(error, ConfigError):
            event |= {"subject": error.subject, "problem": error.problem}
        with contextlib.suppress(OSError):
            self._owner.send(encode(event))

    def __enter__(self) -> RunControl:
        return self

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def __exit__(self, *_exc: object) -> None:
        self._end_watch()
        if self._server is not None:
            self._server.close()
        if self._listener is not None:
            self._listener.close()
        if self._owner is not None:
            self._owner.close()


class OwnerWatch:
    """Ends this process, as SIGTERM does, if the owner goes away before the machine is built.

    A disk's server may let a start wait for ever.
    """

    def __init__(self, owner: socket.socket) -> None:
        self._is_over_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._owner_fd = owner.fileno()
        self._thread = threading.Thread(target=self._run, name="owner", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        os.eventfd_write(self._is_over_fd, 1)
        self._thread.join()
        os.close(self._is_over_fd)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._is_over_fd, select.POLLIN)
        poller.register(self._owner_fd, select.POLLRDHUP)
        ready = dict(poller.poll())
        if self._is_over_fd not in ready:
            os.kill(os.getpid(), signal.SIGTERM)


def owner_socket(
    text: str, *, option: str = "--control-fd", kind: int = socket.SOCK_STREAM
) -> socket.socket:
    """Return the socket that ``option`` names; ConfigError if it names none of ``kind``."""
    option = f"{option} {text}"
    if not (text.isascii() and text.isdigit() and len(text) < 8):
        raise ConfigError(option, "is no number of a descriptor")
    try:
        found = socket.socket(fileno=int(text))
    except OSError as error:
        raise ConfigError(option, f"is no socket: {error.strerror}") from None
    try:
        if found.family != socket.AF_UNIX or found.type != kind:
            word = "stream" if kind == socket.SOCK_STREAM else "seqpacket"
            raise ConfigError(option, f"is no Unix {word} socket")
        try:
            found.getpeername()
        except OSError as error:
            raise ConfigError(option, f"is not connected: {error.strerror}") from None
    except ConfigError:
        found.detach()  # whatever it is, it is not ours
        raise
    found.set_inheritable(False)
    return found
