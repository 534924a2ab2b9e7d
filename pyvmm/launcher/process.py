"""The process of a machine: ``python -m pyvmm run`` with a control socket that it inherits."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.launcher.arguments import Arguments

PROGRAM = (sys.executable, "-P", "-m", "pyvmm", "run")
END_TIMEOUT_S = 10.0
"""Time for the process to end by itself once its socket is closed."""
SEND_S = 30
TERM_TIMEOUT_S = 2.0
"""Time for it to end after SIGTERM; then comes SIGKILL."""


class MachineProcess:
    """The process of a machine: ``socket`` leads to it, ``stderr_fd`` is its standard error.

    It is in a session of its own, so Ctrl-C at the terminal does not reach it.  It ends when
    ``socket`` is closed, and so when this process ends in any way.
    """

    def __init__(self, pid: int, connection: socket.socket, stderr_fd: int) -> None:
        self.pid = pid
        self.socket = connection
        self.stderr_fd = stderr_fd
        # A process that was stopped takes nothing: whoever sends must not wait for ever.
        timeout = struct.pack("ll", SEND_S, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit status, -N after signal N; None if it runs on after ``timeout_s``."""
        raise NotImplementedError

    def wait_for_ever(self) -> int:
        """Return the exit status once the process has ended."""
        raise NotImplementedError

    def hang_up(self) -> None:
        """End the connection, which ends the machine; idempotent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def end(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Hang up and return the exit status; end the process by force after ``timeout_s``."""
        self.hang_up()
        status = self.wait(timeout_s)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, number)
                status = self.wait(TERM_TIMEOUT_S)
        return self.wait_for_ever() if status is None else status

    def close(self) -> None:
        """End the process and close what leads to it; idempotent."""
        self.end()
        self.socket.close()
        if self.stderr_fd >= 0:
            os.close(self.stderr_fd)
            self.stderr_fd = -1


class VmProcess(MachineProcess):
    """A running ``pyvmm run --control-fd N``.  Start it with ``start``."""

    def __init__(
        self, process: subprocess.Popen[bytes], connection: socket.socket, stderr_fd: int
    ) -> None:
        super().__init__(process.pid, connection, stderr_fd)
        self._process = process

    @classmethod
    def start(cls, arguments: Arguments) -> VmProcess:
        """Start the process; HostError if this host lacks descriptors or memory for it."""
        if not sys.executable:
            raise HostError("launch: this Python does not know its own program (sys.executable)")
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            try:
                own, other, stderr_fd, stderr_end = both_ends(ours, theirs)
                process = subprocess.Popen(
                    [*PROGRAM, *arguments.words, f"--control-fd={other.fileno()}"],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr_end,
                    pass_fds=(other.fileno(), *arguments.fds),
                    start_new_session=True, env=environment(),
                )
            except OSError as error:
                raise HostError(f"launch: the process of the VM: {error}") from error
            ours.pop_all()
            return cls(process, own, stderr_fd)

    def wait(self, timeout_s: float) -> int | None:
        """See ``MachineProcess.wait``."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def wait_for_ever(self) -> int:
        """See ``MachineProcess.wait_for_ever``."""
        return self._process.wait()


def both_ends(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket, int, int]:
    """Return both ends of a process's socket, then of its standard error: ours, theirs; OSError.

    The stacks close their own ends.
    """
    own, other = socket.socketpair()
    ours.callback(own.close)
    theirs.callback(other.close)
    stderr_fd, stderr_end = os.pipe()
    ours.callback(os.close, stderr_fd)
    theirs.callback(os.close, stderr_end)
    return own, other, stderr_fd, stderr_end


def environment() -> dict[str, str]:
    """Return the environment in which ``-m pyvmm`` finds this very package.

    ``-P`` keeps the working directory out of the search.  An installed package is found without
    help; others, as a checkout, are found through PYTHONPATH.
    """
    environment = dict(os.environ)
    place = Path(__file__).resolve().parents[2]
    if place.name not in ("site-packages", "dist-packages"):
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{place}{os.pathsep}{others}" if others else str(place)
    return environment
