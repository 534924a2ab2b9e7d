"""``pyvmm restore DIR --clones-fd N``: a process that has all modules loaded and forks the clones.

A start of Python and of pyvmm's modules costs more than all of a clone.  So this process pays for
it once, and each clone is a fork of it that runs ``pyvmm restore`` with the modules that are there.
The process has one thread, so a fork is safe.  It ends when its owner's end of the socket closes.

Each message of the owner, over a SOCK_SEQPACKET socket, is a JSON list of the clone's options.
Descriptors come with it: standard error first, then those that the options name by index,
``{"fd": 1, "before": "--control-fd="}``.  The answer is ``["started", PID]``, or
``["failed", text]``.  Once the clone's process has ended, ``["ended", PID, status]`` follows,
-N for signal N.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence

MAX_MESSAGE_BYTES = 64 << 10
MAX_FDS = 8


class ForkServer:
    """Forks a process for each message on ``owner``, until that is closed.

    ``run`` runs a command with some options in the forked process and returns its exit status.
    """

    def __init__(self, owner: socket.socket, run: Callable[[list[str]], int]) -> None:
        self._owner = owner
        self._run = run
        self._children: dict[int, int] = {}  # by its pidfd, the process

    def serve(self) -> None:
        """Return once the owner has closed its end; the clones end by their own sockets."""
        poller = select.poll()
        poller.register(self._owner, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd != self._owner.fileno():
                    poller.unregister(fd)
                    self._tell_end(fd)
                elif (pidfd := self._take()) is None:
                    return
                elif pidfd >= 0:
                    poller.register(pidfd, select.POLLIN)

    def _take(self) -> int | None:
        """Take one message; return the pidfd of the new process, -1 without one, None at the end.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self._owner, MAX_MESSAGE_BYTES, MAX_FDS)
        except ConnectionError:
            return None
        try:
            if not data:
                return None
            words = _words(data, fds)
            pid = os.fork()
            if pid == 0:
                self._become(words, fds)
            pidfd = _watch(pid)
            self._children[pidfd] = pid
            self._tell("started", pid)
            return pidfd
        except (OSError, ValueError) as error:
            self._tell("failed", str(error))
            return -1
        finally:
            for fd in fds:
                os.close(fd)

    def _become(self, words: list[str], fds: Sequence[int]) -> None:
        """Be the process of a clone, to its end."""
        status = 125
        try:
            os.setsid()
            os.dup2(fds[0], 2)
            os.close(fds[0])
            self._owner.close()
            for pidfd in self._children:
                os.close(pidfd)
            status = self._run(words)
            sys.stdout.flush()
        finally:
            # Nothing of the server's own runs: no handler of its exit, none of its callers.
            os._exit(status)

    def _tell_end(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._tell("ended", pid, os.waitstatus_to_exitcode(status))

    def _tell(self, *words: object) -> None:
        with contextlib.suppress(ConnectionError):  # the next read sees the end
            self._owner.send(json.dumps(words).encode())


def _watch(pid: int) -> int:
    """Return a pidfd of the child ``pid``, which is ended if there can be none: OSError then."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _words(data: bytes, fds: Sequence[int]) -> list[str]:
    """Return the options of a message; ValueError."""
    message = json.loads(data)
    if not isinstance(message, list) or not fds:
        raise ValueError("a message is a list of options, with standard error")
    words = []
    for one in message:
        if isinstance(one, dict):
            index, before = one.get("fd"), one.get("before")
            if not isinstance(index, int) or not 0 < index < len(fds):
                raise ValueError(f"option {one}: there is no such descriptor")
            words.append(f"{before}{fds[index]}")
        elif isinstance(one, str):
            words.append(one)
        else:
            raise ValueError(f"option {one!r} is no text")
    return words
