"""One run of the lab's machine, from power on to exit status: a single loop, and no threads.

The lab has its own signal handling because it is a program of its own (it shares no process with
a virtual machine of pyvmm's).
"""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pyvmm.console.terminal import RawTerminal, Screen
from pyvmm.errors import HostError
from pyvmm.lab.streams import Input, Keyboard, Lines, Output, Signals, Source, Tail, describe
from pyvmm.numerals import shown, whole_number
from pyvmm.report import echo
from pyvmm.run.io_loop import Deadline, IoLoop, IoSource

BEAT_S = 1.0
BOOT_LIMIT_S = 180.0
"""A loaded host may need ten times the usual two seconds; a hung machine is still noticed."""
GRACE_S = 5.0
"""Between SIGTERM and SIGKILL after a timeout, and between SIGKILL and pulling the plug."""
LAST_OUTPUT_S = 5.0
"""Seconds that the last output may take to arrive after CMD's status."""

TIMEOUT_STATUS = 124
LAB_FAILED_STATUS = 125


class Phase(enum.Enum):
    """The phases of a run; each has one deadline."""

    BOOT = enum.auto()
    RUNNING = enum.auto()
    TERMINATING = enum.auto()
    KILLING = enum.auto()
    LAST_OUTPUT = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Our ends of the machine's ports, by name; QEMU's standard output (the console) and errors.

    With a port "terminal" there is no "in" or "out".
    """

    ports: Mapping[str, socket.socket]
    console_fd: int
    messages_fd: int


class Session:
    """Serves a started machine.

    ``end_mark`` ends each of CMD's output streams.  ``kill`` ends the machine at once.
    ``timeout_s`` None means no limit; ``stdin_fd`` None means an empty standard input.
    """

    def __init__(
        self,
        wiring: Wiring,
        *,
        end_mark: bytes,
        kill: Callable[[], None],
        say: Callable[[str], None],
        timeout_s: float | None = None,
        stdin_fd: int | None = 0,
        verbose: bool = False,
    ) -> None:
        self._ports = wiring.ports
        self._verbose = verbose
        self._kill = kill
        self._say = say
        self._timeout_s = timeout_s
        self._stdin_fd = stdin_fd
        self._phase = Phase.BOOT
        self._started_s = time.monotonic()
        self._deadline: Deadline | None = None
        self._interrupts = 0
        self._status: int | None = None
        self._verdict: int | None = None
        """Our own exit status, which overrides ``_status``, CMD's."""
        self._failure = ""
        self._stopped = False

        self._control = wiring.ports["control"]
        self._terminal = wiring.ports.get("terminal")
        self._screen = None if self._terminal is None else Screen.behind(1)
        self._host_terminal = RawTerminal(
            None if self._terminal is None else 0, cooks_output=False, screen=self._screen
        )
        show = functools.partial(echo, end="\r\n" if os.isatty(2) else "\n")
        self._console = Tail(wiring.console_fd, show if verbose else None)
        self._messages = Tail(wiring.messages_fd)
        out = self._terminal or wiring.ports["out"]
        self._outputs = [
            Output(port.fileno(), fd, end_mark, functools.partial(self._hangup, fd))
            for fd, port in ((1, out), (2, wiring.ports["err"]))
        ]
        if self._screen is not None:
            self._outputs[0].shown = self._screen.queries.feed
        self._commands = Lines(self._control.fileno(), self._on_control)
        self._sources: list[Source] = [
            self._commands, *self._outputs, self._console, self._messages
        ]
        self._loop: IoLoop
        """Made by ``run``, which closes it."""
        self._plugged: dict[Source, IoSource] = {}
        """The loop's ``IoSource`` of each source that waits."""

    def run(self) -> int:
        """Serve to the end; return CMD's exit status, or ours: 124 timeout, 128+n signal.

        HostError if the lab failed.
        """
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._sources.append(Signals(read_fd, self._on_signal))
        try:
            self._loop = IoLoop()
            with contextlib.closing(self._loop), _signals_to(write_fd):
                self._tell("hello")
                self._enter(Phase.BOOT, BOOT_LIMIT_S)
                self._loop.call_in(BEAT_S, self._beat)
                self._proceed()
                self._loop.run()
        finally:
            self._restore_terminal()
            os.close(read_fd)
            os.close(write_fd)
        if self._verdict is not None:
            return self._verdict
        if self._status is None:
            self._explain()
            raise HostError(f"lab: {self._failure or 'its machine ended without a status'}")
        return self._status

    def _finished(self) -> bool:
        if self._stopped:
            return True
        over = self._status is not None or self._commands.ended
        return over and all(output.complete for output in self._outputs)

    def _proceed(self) -> None:
        """Have the loop wait for each source's next event, or end; call it after every event."""
        if self._finished():
            self._loop.stop()
            return
        for source in self._sources:
            wanted, plugged = source.waiting_for(), self._plugged.get(source)
            if plugged is not None:
                if wanted == (plugged.fd, plugged.is_output):
                    continue
                self._loop.remove(self._plugged.pop(source))
            if wanted is not None:
                step = functools.partial(self._step, source)
                plugged = self._plugged[source] = IoSource(
                    wanted[0], step, edge_triggered=False, is_output=wanted[1]
                )
                self._loop.add(plugged)

    def _step(self, source: Source) -> None:
        source.step()
        if self._phase is Phase.LAST_OUTPUT and source in self._outputs:
            self._limit(LAST_OUTPUT_S)
        self._proceed()

    def _beat(self) -> None:
        """Wake the machine every BEAT_S.

        Under emulation a timer interrupt is lost once in many minutes, and a CPU that halted would
        then sleep for ever.
        """
        if self._phase is not Phase.BOOT:
            self._tell("beat")
        self._loop.call_in(BEAT_S, self._beat)
        self._proceed()  # the terminal may be ours again

    def _enter(self, phase: Phase, limit_s: float | None) -> None:
        self._phase = phase
        self._limit(limit_s)

    def _limit(self, limit_s: float | None) -> None:
        """End the phase in ``limit_s`` seconds, in place of its old deadline; None: no limit."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if limit_s is None else self._loop.call_in(limit_s, self._expire)

    def _expire(self) -> None:
        """Act on the passed deadline of the phase."""
        match self._phase:
            case Phase.BOOT:
                self._fail(f"its machine did not start within {BOOT_LIMIT_S:g} s")
            case Phase.RUNNING:
                self._say(f"timeout after {self._timeout_s:g} s")
                self._verdict = TIMEOUT_STATUS
                self._tell("signal TERM")
                self._enter(Phase.TERMINATING, GRACE_S)
            case Phase.TERMINATING:
                self._tell("signal KILL")
                self._enter(Phase.KILLING, GRACE_S)
            case Phase.LAST_OUTPUT if any(output.pending for output in self._outputs):
                # The reader of our output is slow, not the lab.
                self._limit(LAST_OUTPUT_S)
            case Phase.KILLING | Phase.LAST_OUTPUT:
                self._stop()
        self._proceed()

    def _on_control(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if verb == "ready":
            if self._verbose:
                self._say(f"ready after {time.monotonic() - self._started_s:.1f} s")
            self._enter(Phase.RUNNING, self._timeout_s)
            self._connect_input()
        elif verb == "exit":
            # Root in the lab, CMD can write to this port too.
            status = whole_number(rest, 0, 255)
            if status is None:
                self._fail(f"it gave no exit status, but {shown(rest)!r}")
                return
            self._status = status
            self._enter(Phase.LAST_OUTPUT, LAST_OUTPUT_S)
        elif verb == "fail":
            self._fail(rest)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGTSTP:
            self._host_terminal.stop_with_shell()
        elif number in (signal.SIGWINCH, signal.SIGCONT):
            self._host_terminal.forget()
            self._send_window_size()
        elif number == signal.SIGINT and self._interrupts == 0 and self._phase is not Phase.BOOT:
            self._interrupts += 1
            self._say("interrupt passed on; press Ctrl-C again to kill the lab")
            self._tell("signal INT")
        else:
            self._verdict = 128 + number
            self._stop()

    def _hangup(self, fd: int, error: OSError) -> None:
        if reason := describe(error):
            stream = "standard output" if fd == 1 else "standard error"
            self._say(f"cannot write {stream}: {reason}")
            self._verdict = LAB_FAILED_STATUS
        self._tell(f"hangup {fd}")

    def _connect_input(self) -> None:
        if self._terminal is not None:
            self._sources.append(
                Keyboard(0, self._terminal, self._escape, self._host_terminal.look)
            )
            self._send_window_size()
        elif self._stdin_fd is not None:
            self._sources.append(Input(self._stdin_fd, self._ports["in"]))
        else:
            self._ports["in"].shutdown(socket.SHUT_WR)

    def _escape(self) -> None:
        self._verdict = 128 + signal.SIGINT
        self._stop()

    def _send_window_size(self) -> None:
        if self._terminal is not None:
            columns, rows = os.get_terminal_size(0)
            self._tell(f"winsize {rows} {columns}")

    def _restore_terminal(self) -> None:
        if self._screen is not None:
            if self._host_terminal.active:
                self._screen.settle()
            self._screen.close()
        self._host_terminal.give_back()

    def _tell(self, line: str) -> None:
        """Send a control line; other code notices a dead machine."""
        with contextlib.suppress(OSError):
            self._control.send(line.encode() + b"\n")

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._stop()

    def _stop(self) -> None:
        self._kill()
        self._stopped = True

    def _explain(self) -> None:
        """Say the last lines of the machine and of QEMU, for whoever has to mend the lab."""
        while any(tail.waiting_for() for tail in (self._console, self._messages)):
            for tail in (self._console, self._messages):
                if not tail.ended:
                    tail.step()
        shown = [] if self._verbose else self._console.lines(25)
        for line in [*shown, *self._messages.lines(10)]:
            self._say(f"| {line}")


@contextlib.contextmanager
def _signals_to(fd: int) -> Iterator[None]:
    """Write the numbers of the signals that concern us to ``fd``, instead of acting on them.

    A signal that our parent had us ignore (nohup, a background job) stays ignored.
    """
    numbers = [
        number
        for number in (
            signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP,
            signal.SIGCONT,
        )
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    saved_fd = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    saved = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(saved_fd)
