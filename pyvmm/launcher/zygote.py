"""A process that forks clones of one snapshot, as its owner sees it (``cli/fork_server.py``)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from pyvmm.errors import HostError, SnapshotError
from pyvmm.launcher.process import (
    END_TIMEOUT_S,
    TERM_TIMEOUT_S,
    MachineProcess,
    both_ends,
    environment,
)
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

PROGRAM = (sys.executable, "-P", "-m", "pyvmm", "restore")
ANSWER_TIMEOUT_S = 120.0
"""Time for the process to load its modules and to fork."""
_MAX_MESSAGE_BYTES = 64 << 10
_LOST = -int(signal.SIGKILL)
"""The status of a clone of which nobody has told the end: its parent was killed."""


class Zygote:
    """A running ``pyvmm restore DIR --clones-fd N``.  Its methods may be called from any thread.

    It ends when this process does, or by ``close``; clones live on until their sockets are closed.
    HostError if it cannot be started.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._lock = threading.Lock()  # one fork at a time
        self._news = threading.Condition()
        self._answers: list[list[Any]] = []
        self._unwanted = 0
        """Answers that come to nobody: who waited was interrupted, or has given up."""
        self._statuses: dict[int, int] = {}
        self._is_over = False
        self._last_words: tuple[int | None, list[str]] | None = None
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with other:
                self._process = subprocess.Popen(
                    [*PROGRAM, *words, f"--clones-fd={other.fileno()}"],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    pass_fds=(other.fileno(),), start_new_session=True, env=environment(),
                )
        except OSError as error:
            own.close()
            raise HostError(f"clone: the process that makes clones: {error}") from error
        self._socket = own
        self._reader = threading.Thread(
            target=self._read, name=f"pyvmm clones {self.pid}", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process that makes the clones."""
        return self._process.pid

    def fork(
        self, words: Sequence[str | dict[str, object]], fds: Sequence[int]
    ) -> int:
        """Have a clone's process forked and return its number; SnapshotError, HostError."""
        with self._lock:
            try:
                socket.send_fds(self._socket, [json.dumps(list(words)).encode()], list(fds))
            except OSError:
                raise self._lost() from None
            kind, found = self._answer()
        if kind == "failed":
            raise HostError(f"clone: {found}")
        return int(found)

    def _answer(self) -> list[Any]:
        """Return the answer to the last message, under ``_lock``; SnapshotError, HostError.

        An answer that comes after an interrupt is dropped.  Its clone ends: its sockets are
        closed.
        """
        until_s = time.monotonic() + ANSWER_TIMEOUT_S
        with self._news:
            try:
                while not self._answers and not self._is_over:
                    if not self._news.wait(until_s - time.monotonic()):
                        raise HostError(
                            "clone: the process that makes clones has not answered in "
                            f"{ANSWER_TIMEOUT_S:g} s"
                        )
            except BaseException:
                self._unwanted += not self._answers
                self._answers.clear()
                raise
            if not self._answers:
                raise self._lost()
            return self._answers.pop()

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """Return the exit status of a clone's process; None if it runs on after ``timeout_s``."""
        with self._news:
            self._news.wait_for(lambda: pid in self._statuses or self._is_over, timeout_s)
            if pid in self._statuses:
                return self._statuses[pid]
            return _LOST if self._is_over and not _is_there(pid) else None

    def forget(self, pid: int) -> None:
        """Forget a clone's process, which has ended."""
        with self._news:
            self._statuses.pop(pid, None)

    def close(self) -> None:
        """End the process; idempotent.  Clones that still run go on."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._socket.close()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(_MAX_MESSAGE_BYTES)
            except OSError:
                data = b""
            with self._news:
                if not data:
                    self._is_over = True
                else:
                    kind, *rest = json.loads(data)
                    if kind == "ended":
                        self._statuses[rest[0]] = rest[1]
                    elif self._unwanted:
                        self._unwanted -= 1
                    else:
                        self._answers.append([kind, *rest])
                self._news.notify_all()
            if not data:
                return

    def _lost(self) -> Exception:
        """Return the error that the process has ended; it said why on its standard error.

        Under ``_lock``.
        """
        if self._last_words is not None:
            return self._error(*self._last_words)
        try:
            status: int | None = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        text = (self._process.stderr.read() or b"").decode("utf-8", "replace").strip()
        lines = [line.removeprefix("pyvmm: ") for line in text.split("\n") if line]
        self._last_words = status, lines
        return self._error(status, lines)

    def _error(self, status: int | None, lines: list[str]) -> Exception:
        if status == 125 and lines:
            subject, _, problem = lines[-1].partition(": ")
            return SnapshotError(subject, problem)
        said = f": {'; '.join(lines[-3:])}" if lines else ""
        return HostError(f"clone: the process that makes clones ended with {status}{said}")


class ForkedProcess(MachineProcess):
    """A clone's process, which ``zygote`` has forked: ``socket`` leads to it."""

    def __init__(
        self, zygote: Zygote, pid: int, connection: socket.socket, stderr_fd: int
    ) -> None:
        super().__init__(pid, connection, stderr_fd)
        self._zygote = zygote
        self._status: int | None = None

    @classmethod
    def start(
        cls, zygote: Zygote, words: Sequence[str | dict[str, object]], fds: Sequence[int]
    ) -> ForkedProcess:
        """Have ``zygote`` fork a process with the options ``words``.

        ``fds`` are those that the options name, as index 2 and on: 0 is standard error, 1 the
        control socket.  HostError, SnapshotError.
        """
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            try:
                own, other, stderr_fd, stderr_end = both_ends(ours, theirs)
            except OSError as error:
                raise HostError(f"clone: {error}") from error
            control = {"fd": 1, "before": "--control-fd="}
            pid = zygote.fork([*words, control], (stderr_end, other.fileno(), *fds))
            ours.pop_all()
            return cls(zygote, pid, own, stderr_fd)

    def wait(self, timeout_s: float) -> int | None:
        """See ``MachineProcess.wait``."""
        if self._status is None:
            self._status = self._zygote.wait(self.pid, timeout_s)
        return self._status

    def wait_for_ever(self) -> int:
        """See ``MachineProcess.wait_for_ever``."""
        while (status := self.wait(TERM_TIMEOUT_S)) is None:
            pass
        return status

    def close(self) -> None:
        """See ``MachineProcess.close``."""
        super().close()
        self._zygote.forget(self.pid)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
