"""Terminal, shell and person around a ``pyvmm`` command, seen from outside its process.

The bench's thread is the terminal: it reads every byte that reaches the screen, answers queries
as xterm does, late if told to, and stops reading for as long as Ctrl-S would have it.  The shell
is ``stand_in_shell``: the command is a job of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.guest import command, environment
from tests.support.patience import patient

SHELL = Path(__file__).with_name("stand_in_shell.py")
ANSWERS = {
    b"\x1b[6n": b"\x1b[24;80R",  # where is the cursor?
    b"\x1b[c": b"\x1b[?62;22c",  # what are you?
    b"\x1b[0c": b"\x1b[?62;22c",
    b"\x1b[>c": b"\x1b[>41;354;0c",
    b"\x1b[5n": b"\x1b[0n",
    b"\x1b[21t": b"\x1b]ltitle\x1b\\",
    b"\x1bZ": b"\x1b[?62;22c",
    b"\x1b]11;?\x07": b"\x1b]11;rgb:0000/0000/0000\x07",
    b"\x1bP$qm\x1b\\": b"\x1bP1$r0m\x1b\\",
    b"\x05": b"xterm",
}
_QUERY = re.compile(b"|".join(re.escape(query) for query in ANSWERS))


class TerminalBench:
    """A terminal of 80 by 24 with a shell; a context manager.

    ``answer_after_s`` is how long an answer is on its way; None: the terminal knows none.
    """

    def __init__(self, *, answer_after_s: float | None = 0.0) -> None:
        self.answer_after_s = answer_after_s
        self.screen = bytearray()
        """Every byte shown so far."""
        self._lock = threading.Lock()
        self._reads = threading.Event()
        self._reads.set()
        self._over = threading.Event()
        self._seen_to = self._asked_to = 0
        self._answers: list[tuple[float, bytes]] = []
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._control, theirs = socket.socketpair()
        self._replies = self._control.makefile("r")

        def lead_a_session() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        number = theirs.fileno()
        self._shell = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SHELL), str(number)],
            stdin=slave, stdout=slave, stderr=slave,
            preexec_fn=lead_a_session, pass_fds=(number,),
        )
        theirs.close()
        os.close(slave)
        self._thread = threading.Thread(target=self._be_the_terminal, daemon=True)
        self._thread.start()

    # The terminal

    def stop_reading(self) -> None:
        """As Ctrl-S, or a window that is scrolled back."""
        self._reads.clear()
        time.sleep(0.1)  # a read that is under way ends

    def go_on_reading(self) -> None:
        self._reads.set()

    def wait_for(self, text: bytes, timeout_s: float = 60) -> None:
        """Until ``text`` is on the screen, behind what was waited for before."""
        until_s = time.monotonic() + timeout_s
        while True:
            with self._lock:
                place = self.screen.find(text, self._seen_to)
                if place >= 0:
                    self._seen_to = place + len(text)
                    return
            assert time.monotonic() < until_s, f"no {text!r} in {bytes(self.screen)!r}"
            time.sleep(0.01)

    def shown(self) -> bytes:
        """All that was shown so far."""
        with self._lock:
            return bytes(self.screen)

    def type(self, keys: bytes) -> None:
        """Keys, for whoever reads the terminal."""
        while keys:
            select.select([], [self._master], [])
            keys = keys[os.write(self._master, keys) :]

    def _be_the_terminal(self) -> None:
        while not self._over.is_set():
            if not self._reads.wait(0.1):
                continue
            now_s = time.monotonic()
            while self._answers and self._answers[0][0] <= now_s:
                os.write(self._master, self._answers.pop(0)[1])
            waits_s = 0.1
            if self._answers:
                waits_s = max(0.0, self._answers[0][0] - now_s)
            if not select.select([self._master], [], [], min(waits_s, 0.1))[0]:
                continue
            try:
                data = os.read(self._master, 4096)
            except OSError:  # nobody has the other side
                return
            with self._lock:
                self.screen += data
                for query in _QUERY.finditer(self.screen, self._asked_to):
                    self._asked_to = query.end()
                    if self.answer_after_s is not None:
                        at_s = time.monotonic() + self.answer_after_s
                        self._answers.append((at_s, ANSWERS[query.group()]))

    # The shell

    def start(
        self, argv: Sequence[str], *, background: bool = False,
        files: Mapping[str, Path | str] | None = None, keeps_modes: bool = False,
        ignores: Sequence[int] = (), variables: Mapping[str, str] | None = None,
    ) -> int:
        """Start a job; its process id.  ``files``: ``{"2>": path}`` and the like."""
        return int(self._tell(
            "start", argv=list(argv), background=background, keeps_modes=keeps_modes,
            environment={**environment(), **(variables or {})}, ignores=list(map(int, ignores)),
            files={sign: str(path) for sign, path in (files or {}).items()},
        )["pid"])

    def run(self, kernel: Path, *options: str, **how: Any) -> int:
        """Start ``pyvmm run`` with ``kernel``."""
        return self.start(command(*options, kernel=kernel), **how)

    def status(self, timeout_s: float = 60) -> int:
        """The job's exit status, as subprocess has it: below 0 for a signal."""
        answer = self._tell("wait", timeout_s=timeout_s)
        assert "status" in answer, f"{answer}: {self.shown()!r}"
        return int(answer["status"])

    def wait_until_stopped(self, timeout_s: float = 20) -> None:
        """Until the job is stopped, and the shell has its terminal again."""
        answer = self._tell("wait", timeout_s=timeout_s)
        assert answer == {"stopped": True}, f"{answer}: {self.shown()!r}"

    def runs(self, for_s: float = 0.0) -> bool:
        """Whether the job neither ends nor is stopped for so long."""
        return self._tell("wait", timeout_s=max(0.02, for_s)) == {"runs": True}

    def fg(self) -> None:
        """Give the job the terminal, and let it go on if it is stopped."""
        self._tell("fg")

    def bg(self) -> None:
        """Let the stopped job go on in the background."""
        self._tell("bg")

    def kill(self, number: int) -> None:
        """Send the job a signal."""
        self._tell("kill", number=int(number))

    def take_terminal(self) -> None:
        """Make the job one in the background, without a word to it."""
        self._tell("take")

    def typed_for_the_shell(self, after_s: float = 0.0) -> bytes:
        """What the shell would read as typed, once ``after_s`` have passed."""
        time.sleep(after_s)
        return bytes(self._tell("read")["data"], "latin-1")

    def has_its_modes_back(self) -> bool:
        """Whether the terminal is as it was before the job."""
        return bool(self._tell("is_as_before")["same"])

    def _tell(self, what: str, **more: Any) -> dict[str, Any]:
        self._control.sendall(json.dumps({"do": what, **more}).encode() + b"\n")
        line = self._replies.readline()
        assert line, f"the shell has died: {self.shown()!r}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> TerminalBench:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._reads.set()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        try:
            self._shell.wait(patient(10))
        except subprocess.TimeoutExpired:
            self._shell.send_signal(signal.SIGKILL)
            self._shell.wait()
        self._over.set()
        self._thread.join(patient(10))
        self._replies.close()
        self._control.close()
        os.close(self._master)


def wait_until(
    holds: Callable[[], object], timeout_s: float = 30, what: str = "it did not come about"
) -> None:
    """Until ``holds()`` is true."""
    until_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until_s, what
        time.sleep(0.02)
