"""A shell with job control and nothing else, told over a socket what to do: for ``TerminalBench``.

A program of its own, because a shell is a session's leader and the terminal's owner.  Each line
of its socket, the descriptor it is given, is a JSON request; each answer is a JSON line.  As bash
does, it takes the terminal and its own modes back when a foreground job ends or stops, and
continues a job only if that is stopped.  With ``keeps_modes`` it leaves the modes as the job had
them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import termios
import time
from typing import Any

SHELLS_OWN = (signal.SIGTTOU, signal.SIGTTIN, signal.SIGTSTP, signal.SIGINT, signal.SIGQUIT)


class Shell:
    """The one job of a bench, and the terminal on descriptor 0."""

    def __init__(self) -> None:
        for number in SHELLS_OWN:
            signal.signal(number, signal.SIG_IGN)
        os.tcsetpgrp(0, os.getpgrp())
        self.modes = termios.tcgetattr(0)
        self.keeps_modes = False
        self.job = 0
        self.stopped = False
        self.ended: dict[str, int] | None = None

    def start(
        self, argv: list[str], background: bool, environment: dict[str, str],
        files: dict[str, str], keeps_modes: bool, ignores: list[int],
    ) -> dict[str, Any]:
        """Start the job; ``files`` are what ``<``, ``>``, ``>>``, ``2>`` redirect to."""
        self.keeps_modes = keeps_modes
        self.job = os.fork()
        if self.job == 0:
            os.setpgid(0, 0)
            if not background:
                os.tcsetpgrp(0, os.getpid())
            for number in (*map(int, SHELLS_OWN), *ignores):
                ignored = number in ignores
                signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            how = {"<": (0, os.O_RDONLY), "2>": (2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
                   ">": (1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
                   ">>": (1, os.O_WRONLY | os.O_CREAT | os.O_APPEND)}
            os.closerange(3, 64)
            for sign, path in files.items():
                fd, flags = how[sign]
                os.dup2(os.open(path, flags, 0o600), fd)
            os.execve(argv[0], argv, environment)
        with contextlib.suppress(OSError):  # it was faster, and has done both itself
            os.setpgid(self.job, self.job)
            if not background:
                os.tcsetpgrp(0, self.job)
        return {"pid": self.job}

    def look(self) -> None:
        """Take in how the job is; the terminal back if it does not run any more."""
        if self.ended is not None or not self.job:
            return
        pid, status = os.waitpid(self.job, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if not pid:
            return
        if os.WIFCONTINUED(status):
            self.stopped = False
            return
        self.stopped = os.WIFSTOPPED(status)
        if not self.stopped:
            self.ended = {"status": os.waitstatus_to_exitcode(status)}
        if os.tcgetpgrp(0) == self.job or self.ended:
            os.tcsetpgrp(0, os.getpgrp())
            if not self.keeps_modes:
                termios.tcsetattr(0, termios.TCSADRAIN, self.modes)

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Until the job has ended or stopped: ``{"status": n}``, ``{"stopped": true}``."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            self.look()
            if self.ended is not None:
                return self.ended
            if self.stopped:
                return {"stopped": True}
            time.sleep(0.01)
        return {"runs": True}

    def fg(self) -> dict[str, Any]:
        """Give the job the terminal; SIGCONT only if it is stopped."""
        self.look()
        os.tcsetpgrp(0, self.job)
        return self.bg()

    def bg(self) -> dict[str, Any]:
        """Let a stopped job go on where it is."""
        if self.stopped:
            self.stopped = False
            os.killpg(self.job, signal.SIGCONT)
        return {}

    def kill(self, number: int) -> dict[str, Any]:
        """A signal for the job's process group."""
        if self.ended is None:
            os.killpg(self.job, number)
        return {}

    def take(self) -> dict[str, Any]:
        """The terminal for the shell, though the job goes on."""
        os.tcsetpgrp(0, os.getpgrp())
        termios.tcsetattr(0, termios.TCSADRAIN, self.modes)
        return {}

    def read(self) -> dict[str, Any]:
        """What is in the input queue: a shell would take it for what a person types."""
        raw = termios.tcgetattr(0)
        before = termios.tcgetattr(0)
        raw[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
        raw[6][termios.VMIN], raw[6][termios.VTIME] = 0, 0
        termios.tcsetattr(0, termios.TCSANOW, raw)
        data = b""
        while piece := os.read(0, 4096):
            data += piece
        termios.tcsetattr(0, termios.TCSANOW, before)
        return {"data": data.decode("latin-1")}

    def is_as_before(self) -> dict[str, Any]:
        """Whether the terminal's modes are those before the job."""
        return {"same": termios.tcgetattr(0)[:4] == self.modes[:4]}


def main() -> None:
    """Serve requests until the other end hangs up, and take the job along."""
    control = socket.socket(fileno=int(sys.argv[1]))
    shell = Shell()
    with control, control.makefile("r") as requests:
        for line in requests:
            request = json.loads(line)
            answer = getattr(shell, request.pop("do"))(**request)
            control.sendall(json.dumps(answer).encode() + b"\n")
    if shell.job and shell.ended is None:
        os.killpg(shell.job, signal.SIGKILL)


if __name__ == "__main__":
    main()
    sys.exit(0)
