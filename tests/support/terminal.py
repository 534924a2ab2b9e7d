"""``pyvmm run`` on a pseudo-terminal, and what a person there types and sees."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.guest import KERNEL, command, environment
from tests.support.patience import patient


class Terminal:
    """A pseudo-terminal of ``rows`` and ``columns`` with ``pyvmm run`` in its foreground.

    ``words`` is another command line for it.
    """

    def __init__(
        self, *options: str, rows: int = 24, columns: int = 80, kernel: Path = KERNEL,
        words: Sequence[str] = (),
    ) -> None:
        self.seen = b""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            argv = list(words) or command(*options, kernel=kernel)
            os.execve(argv[0], argv, environment())

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Read until ``text`` has been shown behind what was waited for before."""
        until_s = time.monotonic() + patient(timeout_s)
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.master], [], [], until_s - time.monotonic())
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.master, 4096)
        self.seen = self.seen.partition(text.encode())[2]

    def hear(self, duration_s: float) -> bytes:
        """What is shown in so much time, behind what was waited for."""
        until_s = time.monotonic() + duration_s
        while (left_s := until_s - time.monotonic()) > 0:
            if select.select([self.master], [], [], left_s)[0]:
                self.seen += os.read(self.master, 4096)
        heard, self.seen = self.seen, b""
        return heard

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def status(self, timeout_s: float = 30) -> int:
        """The exit status, while output goes on being read."""
        until_s = time.monotonic() + patient(timeout_s)
        while time.monotonic() < until_s:
            if select.select([self.master], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # the other side is closed
                    self.seen += os.read(self.master, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running; {self.seen!r}")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)
