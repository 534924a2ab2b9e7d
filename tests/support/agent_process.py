"""A process as ``pyvmm run --control-fd N``, whose guest is the agent's program on this host.

It takes the place of a VM's process: real requests, a real agent, real commands, and no KVM.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from pyvmm.agent.binary import PROGRAM
from pyvmm.control.run_control import owner_socket
from pyvmm.control.server import Server
from tests.support.stand_in_saves import StandInSaves
from tests.support.stand_in_target import StandInTarget

PIECE = 64 << 10


class AgentPort:
    """The agent's program behind a socket pair, as the port that a bridge takes."""

    def __init__(self) -> None:
        self._start()
        self._is_closed = self._was_hung_up = False
        self._news = os.eventfd(0, os.EFD_NONBLOCK)
        self._wants_room = False
        self._waiting = b""
        self._thread: threading.Thread | None = None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.agent = subprocess.Popen(
                [PROGRAM, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._socket.setblocking(False)

    def connect(
        self, *, on_data: Callable[[bytes], int], on_room: Callable[[], None],
        on_open: Callable[[bool], None],
    ) -> None:
        self._on_data, self._on_room, self._on_open = on_data, on_room, on_open
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def receive(self, data: bytes) -> int:
        try:
            done = self._socket.send(data)
        except BlockingIOError:
            done = 0
        except OSError:
            return len(data)  # the agent has gone
        if done < len(data):
            self._wants_room = True
            os.eventfd_write(self._news, 1)
        return done

    def more_room(self) -> None:
        os.eventfd_write(self._news, 1)

    def hang_up(self) -> None:
        """See ``Port.hang_up``; an agent opens its port again then."""
        self._was_hung_up = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the agent, and free all descriptors."""
        self._is_closed = True
        self.agent.kill()
        self.agent.wait()
        if self._thread is not None:
            self._thread.join()
        self._socket.close()
        os.close(self._news)

    def _run(self) -> None:
        self._on_open(True)
        while True:
            poller = select.poll()
            poller.register(self._news, select.POLLIN)
            events = 0 if self._waiting else select.POLLIN
            poller.register(self._socket, events | (select.POLLOUT if self._wants_room else 0))
            ready = dict(poller.poll())
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._news)
            if ready.get(self._socket.fileno(), 0) & select.POLLOUT:
                self._wants_room = False
                self._on_room()
            if not self._waiting and ready.get(self._socket.fileno(), 0) & ~select.POLLOUT:
                try:
                    self._waiting = self._socket.recv(PIECE)
                except BlockingIOError:
                    continue
                except OSError:
                    self._waiting = b""
                if not self._waiting:
                    self._on_open(False)
                    if self._is_closed or not self._was_hung_up:
                        return
                    self._was_hung_up = False
                    self.agent.wait()
                    self._socket.close()
                    self._start()
                    self._on_open(True)
                    continue
            self._waiting = self._waiting[self._on_data(self._waiting) :]


def main() -> None:
    """Serve the descriptor in the last argument until its owner has gone."""
    port = AgentPort()
    target = StandInTarget()
    target.agent_port = port
    target.saves = StandInSaves(target)
    target.saves.on_rewind = port.hang_up
    server = Server(
        target, owner=owner_socket(sys.argv[-1].removeprefix("--control-fd=")),
        report=lambda line: print(f"pyvmm: {line}", file=sys.stderr),
    )
    server.start()
    is_on = True
    while is_on:
        target.finished.wait()
        assert target.outcome is not None
        is_on = server.end(target.outcome)
    server.close()
    port.close()


if __name__ == "__main__":
    main()
