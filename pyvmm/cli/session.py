"""A run at a command line: signals, the terminal and the keys of the person who started it.

The session owns the process's main thread until the run is over, and then restores the signals and
the terminal.  It plugs into the loop of a ``Runner``, which knows nothing of it.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.console.terminal import RawTerminal
from pyvmm.console.typed import EscapeFilter, TypedInput, help_text
from pyvmm.machine import Machine
from pyvmm.run.io_loop import Deadline, IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.run.signals import JOB_SIGNALS, NOTICE_SIGNALS, REFRESH_SIGNAL, RESIZE_SIGNAL, Signals
from pyvmm.startup.types import Protocol

SWITCH_INTERVAL_S = 1e-4
"""A busy Python thread keeps the GIL for this long; 5 ms, the default, would starve a vCPU."""
PAUSED, RESUMED = "\npaused; Ctrl-A p resumes\n", "\nresumed\n"
BUSY = "\na snapshot is being taken; press the key again\n"


class SnapshotKey(Protocol):
    """Whoever takes a snapshot when a person types Ctrl-A s; ``cli/warm.py`` does."""

    @property
    def is_taking(self) -> bool:
        """True while the snapshot is being taken, and the guest may be paused for it."""

    def on_key(self) -> None:
        """Begin to take it, without waiting for it."""


def run_at_terminal(machine: Machine, snapshot: SnapshotKey | None = None) -> Outcome:
    """Run ``machine`` to its end in the main thread, with its signals and terminal.

    ``snapshot`` is begun by Ctrl-A s.
    """
    notices: dict[int, Callable[[], None]] = {
        REFRESH_SIGNAL: machine.board.refresh, RESIZE_SIGNAL: machine.consoles.terminal_changed
    }
    return run_session(
        machine.runner, machine.run, console=machine.console, output=machine.output,
        receive=machine.consoles.receive, notices=notices, snapshot=snapshot,
    )


def run_session(
    runner: Runner,
    run: Callable[[], Outcome],
    *,
    console: Console,
    output: OutputBuffer,
    receive: Callable[[bytes], int],
    notices: Mapping[int, Callable[[], None]] = MappingProxyType({}),
    snapshot: SnapshotKey | None = None,
) -> Outcome:
    """Call ``run``, which runs ``runner`` in this thread, with the process's signals and terminal.

    ``receive`` takes typed bytes and returns how many it took.  ``notices`` are called, in this
    thread, after a signal among NOTICE_SIGNALS.
    """
    session = _Session(runner, console, output, receive, notices, snapshot)
    switch_interval_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if console.screen is not None:
        output.as_shown = console.as_shown
    try:
        with Signals(session.on_signal) as signals, session.terminal:
            session.plug(signals.wakeup_fd)
            outcome = run()
            if console.screen is not None:
                console.screen.settle()
    finally:
        sys.setswitchinterval(switch_interval_s)
    return outcome


class _Session:
    """The sources and state of ``run_session``; all but ``on_signal`` runs in the loop's thread."""

    def __init__(
        self,
        runner: Runner,
        console: Console,
        output: OutputBuffer,
        receive: Callable[[bytes], int],
        notices: Mapping[int, Callable[[], None]],
        snapshot: SnapshotKey | None,
    ) -> None:
        self._runner = runner
        self._loop = runner.loop
        self._output = output
        self._receive = receive
        self._notices = notices
        self._snapshot = snapshot
        self._noticed: set[int] = set()
        """Signals that came since the last look and do not end the run."""
        self.terminal = RawTerminal(console.input_fd, screen=console.screen)
        escapes = EscapeFilter(
            on_quit=lambda: runner.finish(Outcome(Kind.QUIT)),
            on_pause=self._toggle_pause,
            on_help=lambda: output.say(help_text(has_snapshot=snapshot is not None)),
            on_snapshot=None if snapshot is None else snapshot.on_key,
        )
        self._typed = TypedInput(escapes, runner.report)
        self._input: IoSource | None = None
        """Standard input; None if there is none, or at its end."""
        if console.input_fd is not None:
            self._input = IoSource(console.input_fd, self._read, edge_triggered=False)
        self._is_read = False
        """True while the loop waits for the input."""
        self._next_look: Deadline | None = None

    def plug(self, signal_fd: int) -> None:
        """Add the sources to the runner's loop; ``signal_fd`` is readable after a signal."""
        take = functools.partial(self._take_signals, signal_fd)
        self._loop.add(IoSource(signal_fd, take, edge_triggered=False))
        self._runner.on_wake(self._look)

    def on_signal(self, number: int) -> None:
        """Handle signal ``number``; called wherever the main thread is."""
        if number in NOTICE_SIGNALS or number in JOB_SIGNALS:
            self._noticed.add(number)
            return
        self._runner.finish(Outcome(Kind.SIGNAL, number, signal.Signals(number).name))

    # Signals

    def _take_signals(self, fd: int) -> None:
        """Act on the signals that came since the last time."""
        os.read(fd, 4096)  # the handlers have run by now
        if signal.SIGCONT in self._noticed:
            self._noticed.discard(signal.SIGTSTP)  # as the kernel does with one not delivered yet
        while self._noticed:
            number = self._noticed.pop()
            if number == signal.SIGTSTP:
                self.terminal.stop_with_shell(lambda: signal.SIGCONT in self._noticed)
            elif number == signal.SIGCONT:
                self.terminal.forget()
            # The terminal may have changed its size while the process was stopped.
            number = RESIZE_SIGNAL if number in JOB_SIGNALS else number
            if notice := self._notices.get(number):
                notice()
        self._look()

    # Typed bytes

    def _look(self) -> None:
        """Hand over typed bytes, and read on if there is room and the terminal is ours."""
        self._hand_over()
        if self._input is None:
            return
        # A terminal is read even while the guest is not listening, or Ctrl-A x would not work.
        reads = self.terminal.look() and (self.terminal.active or self._typed.has_room)
        if reads != self._is_read:
            self._is_read = reads
            if reads:
                self._loop.add(self._input)
            else:
                self._loop.remove(self._input)
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        if (look_s := self.terminal.look_s) is not None:
            self._next_look = self._loop.call_in(look_s, self._look)

    def _read(self) -> None:
        if self._input is not None and self.terminal.look():
            data = _read_input(self._input.fd)
            if data is None:
                self._loop.remove(self._input)
                self._input, data = None, b""
            self._typed.add(data, from_terminal=self.terminal.active)
        self._look()

    def _hand_over(self) -> None:
        if self._typed and not self._runner.is_quiesced:
            # Set before asking: room that comes after the answer makes another wake-up.
            self._runner.input_waits = True
            self._runner.input_waits = self._typed.hand_over(self._receive)

    # Keys

    def _toggle_pause(self) -> None:
        if self._snapshot is not None and self._snapshot.is_taking:
            self._output.say(BUSY)
            return
        # Do not wait for the pause: a vCPU may have to wait for this thread.
        if self._runner.is_paused:
            self._runner.resume()
        else:
            self._runner.begin_pause()
        self._output.say(PAUSED if self._runner.is_paused else RESUMED)


def _read_input(fd: int) -> bytes | None:
    """Return the bytes that were typed; None at the end of the input."""
    try:
        return os.read(fd, 1024) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None  # the terminal hung up
