"""Running a machine: with ``serving.py``, the only place that starts threads or handles signals.

One thread a vCPU sits in KVM_RUN, one thread an I/O worker waits for its devices' ioeventfds, and
the main thread moves console bytes, watches the clock and takes signals.  The first ``finish()``
decides the outcome; every thread is then kicked, stopped and joined.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from pyvmm.console.output import DRAIN_TIMEOUT_S, STALL_S, OutputBuffer, OutputPump
from pyvmm.console.place import Console
from pyvmm.console.terminal import RawTerminal
from pyvmm.console.typed import HELP, EscapeFilter, TypedInput
from pyvmm.report import Reporter
from pyvmm.run.halts import HaltWatch
from pyvmm.run.io_loop import IoLoop, IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.signals import JOB_SIGNALS, KICK_SIGNAL, NOTICE_SIGNALS, RESIZE_SIGNAL, Signals
from pyvmm.run.vcpu_loop import VcpuLoop
from pyvmm.run.vcpus import Vcpus

JOIN_TIMEOUT_S = 5.0
ASKED_FOR = (Kind.QUIT, Kind.TIMEOUT, Kind.SIGNAL)
"""Ends that somebody outside asked for, who does not wait for a reader of the console."""
PAUSED, RESUMED = "\npaused; Ctrl-A p resumes\n", "\nresumed\n"


class Runner:
    """Runs vCPUs, I/O workers and the console until somebody calls ``finish``.

    ``finish``, ``wake`` and ``resume`` may be called from any thread, ``pause`` from any that is
    not the run's own; all else belongs to the main thread.
    """

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Appending is atomic, so also safe in a signal handler that interrupts an append.
        self._outcomes: list[Outcome] = []
        self._stopping = False
        self._deadlines: list[tuple[float, Callable[[], None]]] = []
        self._halts = HaltWatch(time.monotonic())
        self._input_waits = False
        self._noticed: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._main_thread: threading.Thread | None = None
        self._vcpus = Vcpus(KICK_SIGNAL)
        self._io_loops: list[IoLoop] = []

    def finish(self, outcome: Outcome) -> None:
        """End the run with ``outcome``; the first call wins."""
        self._outcomes.append(outcome)
        self._stopping = True
        self.wake()

    def wake(self) -> None:
        """Make the main thread look again: console bytes to move, room for input, an outcome."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake_fd, 1)

    def input_room(self) -> None:
        """The guest has room for typed bytes again: go on if some are waiting."""
        if self._input_waits:
            self.wake()

    def finish_after(self, delay_s: float, outcome: Outcome) -> None:
        """End the run with ``outcome`` in ``delay_s`` seconds, if nothing else ended it before."""
        self.call_after(delay_s, functools.partial(self.finish, outcome))

    def call_after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, on the main thread, in ``delay_s`` seconds of the run."""
        self._deadlines.append((time.monotonic() + delay_s, callback))
        self.wake()

    def watch_for_halt(self) -> None:
        """The guest said that it halts: end the run once all vCPUs have, with interrupts off."""
        self._halts.announce(time.monotonic())

    def pause(self, timeout_s: float | None = None) -> bool:
        """Pause the guest: True once every vCPU has left KVM_RUN and waits for ``resume``.

        Before the run it is True at once, and the guest will start paused.  False, without a
        pause, if the run is over or ends meanwhile, be it by a vCPU that fails, or if another
        thread resumes the guest.  False too after ``timeout_s`` seconds (None: wait for as long as
        it takes): a vCPU at a device, say one that waits for a full console, parks only when it is
        done there.  The pause stays asked for then, and no vCPU enters the guest.

        RuntimeError in a thread of the run: it would wait for itself, or for one that needs it.

        Time goes on: the host's clock, the guest's, ``finish_after``.  Whatever ends a run ends a
        paused one.  The threads of the devices go on too: they serve what is in the rings, and
        interrupts, as those of the timers in KVM, wait for the guest.  kvm-clock tells it of the
        pause, so that its watchdogs see no lock-up.
        """
        if threading.current_thread() in (self._main_thread, *self._threads):
            raise RuntimeError("pause() in a thread of the run would wait for ever: use another")
        self._vcpus.begin_pause()
        return self._vcpus.wait_until_parked(timeout_s)

    def resume(self) -> None:
        """Let a paused guest go on; nothing if it is not paused.  Once is enough."""
        self._vcpus.resume()

    @property
    def is_paused(self) -> bool:
        """Whether a pause was asked for and not taken back."""
        return self._vcpus.is_paused

    def run(
        self,
        *,
        vcpus: Sequence[VcpuLoop],
        workers: Sequence[tuple[str, Sequence[IoSource]]],
        console: Console,
        output: OutputBuffer,
        receive: Callable[[bytes], int],
        notices: Mapping[int, Callable[[], None]] = MappingProxyType({}),
        at_end: Sequence[Callable[[], None]] = (),
    ) -> Outcome:
        """Run to the end; every thread is stopped and the terminal restored when this returns.

        ``workers`` are ``(thread name, sources)``: a thread each, so that one disk that waits
        never holds up another.  ``receive`` takes typed bytes and says how many it took;
        ``notices`` are called, on this thread, after a signal among NOTICE_SIGNALS; those of
        ``at_end`` before the threads are waited for, which may wait for a peer themselves.
        """
        switch_interval_s = sys.getswitchinterval()
        # A busy Python thread keeps the GIL for this long; 5 ms would starve the vCPU.
        sys.setswitchinterval(1e-4)
        self._main_thread = threading.current_thread()
        screen = console.screen
        shown = None if screen is None else screen.queries.feed
        if screen is not None:
            output.as_shown = console.as_shown
        pump = OutputPump(output, self._lose_output, shown, console.has_reader)
        if not console.has_reader():
            self._report(
                f"--console {console.name}: nobody reads this FIFO yet; once {output.LIMIT} bytes "
                "wait, the guest waits too"
            )
        try:
            with (
                Signals(self._on_signal) as signals,
                RawTerminal(console.input_fd, screen=screen) as terminal,
            ):
                try:
                    self._start(vcpus, workers)
                    self._main_loop(
                        console, output, pump, receive, terminal, signals.wakeup_fd, notices
                    )
                finally:
                    output.shut()
                    for prepare in at_end:
                        prepare()
                    self._stop()
                is_hurried = self._outcomes[0].kind in ASKED_FOR
                is_all = pump.finish(STALL_S if is_hurried else DRAIN_TIMEOUT_S)
                if not (is_all or console.has_reader()):
                    self._report(f"--console {console.name}: nobody has read this FIFO")
                if screen is not None:
                    screen.settle()
        finally:
            self._main_thread = None
            sys.setswitchinterval(switch_interval_s)
        return self._outcomes[0]

    def close(self) -> None:
        """Close the runner's own eventfds; idempotent, after ``run``."""
        for name in ("_wake_fd", "_stop_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)

    # The main thread ---------------------------------------------------------------------------

    def _main_loop(
        self,
        console: Console,
        output: OutputBuffer,
        pump: OutputPump,
        receive: Callable[[bytes], int],
        terminal: RawTerminal,
        signal_fd: int,
        notices: Mapping[int, Callable[[], None]],
    ) -> None:
        def toggle_pause() -> None:
            # Not waiting for it: a vCPU may have to wait for this thread.
            if self.is_paused:
                self.resume()
            else:
                self._vcpus.begin_pause()
            output.say(PAUSED if self.is_paused else RESUMED)

        escapes = EscapeFilter(
            on_quit=lambda: self.finish(Outcome(Kind.QUIT)),
            on_pause=toggle_pause,
            on_help=lambda: output.say(HELP),
        )
        typed = TypedInput(escapes, self._report)
        input_fd = console.input_fd
        while not self._stopping:
            poller = select.poll()
            poller.register(self._wake_fd, select.POLLIN)
            poller.register(signal_fd, select.POLLIN)
            # A terminal is read even while the guest is not listening, or Ctrl-A x would not work.
            reads = terminal.look() and (terminal.active or typed.has_room)
            if input_fd is not None and reads:
                poller.register(input_fd, select.POLLIN)
            output_fd = pump.fd_to_write()
            if output_fd is not None:
                poller.register(output_fd, select.POLLOUT)
            # What is being shown waits for the terminal, not for the clock.
            show_s = pump.due_s if output_fd is None else None
            ready = dict(poller.poll(self._poll_timeout_ms(show_s, terminal.look_s)))
            if self._wake_fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
            if signal_fd in ready:
                os.read(signal_fd, 4096)  # the handler has run by now
                self._notice(notices, terminal)
            if output_fd in ready:
                pump.write()
            if input_fd is not None and input_fd in ready and terminal.look():
                data = _read_input(input_fd)
                if data is None:
                    input_fd, data = None, b""
                typed.add(data, from_terminal=terminal.active)
            if typed:
                # Set before asking: room that comes after the answer makes another wake-up.
                self._input_waits = True
                self._input_waits = typed.hand_over(receive)
            self._check_clock()

    def _notice(
        self, notices: Mapping[int, Callable[[], None]], terminal: RawTerminal
    ) -> None:
        """Do what the signals ask for that came since the last time."""
        if signal.SIGCONT in self._noticed:
            self._noticed.discard(signal.SIGTSTP)  # as the kernel does with one not delivered yet
        while self._noticed:
            number = self._noticed.pop()
            if number == signal.SIGTSTP:
                terminal.stop_with_shell(lambda: signal.SIGCONT in self._noticed)
            elif number == signal.SIGCONT:
                terminal.forget()
            # While it was stopped, the terminal may have got another size.
            number = RESIZE_SIGNAL if number in JOB_SIGNALS else number
            if notice := notices.get(number):
                notice()

    def _poll_timeout_ms(self, show_s: float | None, look_s: float | None) -> int:
        """How long to wait for events; ``show_s`` is when there is something to show, ``look_s``
        in how long the terminal is to be looked at."""
        waits_s = [self._halts.due_s, *(at_s for at_s, _ in self._deadlines)]
        if show_s is not None:
            waits_s.append(show_s)
        if look_s is not None:
            waits_s.append(time.monotonic() + look_s)
        return int(max(0.0, min(waits_s) - time.monotonic()) * 1000) + 1

    def _check_clock(self) -> None:
        now_s = time.monotonic()
        for deadline in [one for one in self._deadlines if now_s >= one[0]]:
            self._deadlines.remove(deadline)
            deadline[1]()
        # Not at every turn of this loop: a kick's signal wakes this thread too.
        if now_s >= self._halts.due_s:
            cpu_time_s = self._vcpus.cpu_time_s()
            if self.is_paused:
                self._halts.start_anew(now_s, cpu_time_s)
            elif self._halts.is_worth_it(now_s, cpu_time_s):
                self._vcpus.inspect()

    def _lose_output(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self.finish(Outcome(Kind.SIGNAL, signal.SIGPIPE, "nobody reads the console any more"))
        else:
            self._report(f"console output is lost from here on: {error.strerror}")

    def _on_signal(self, number: int) -> None:
        if number in NOTICE_SIGNALS or number in JOB_SIGNALS:
            self._noticed.add(number)
            return
        self.finish(Outcome(Kind.SIGNAL, number, signal.Signals(number).name))

    # Threads -----------------------------------------------------------------------------------

    def _start(
        self, vcpus: Sequence[VcpuLoop], workers: Sequence[tuple[str, Sequence[IoSource]]]
    ) -> None:
        # The guest first: what it rings for before the others are there waits in an eventfd.
        self._vcpus.begin(vcpus)
        for index, vcpu in enumerate(vcpus):
            self._spawn(f"vcpu{index}", functools.partial(self._vcpus.run, vcpu))
        for name, sources in workers:
            loop = IoLoop(sources, self._stop_fd)
            self._io_loops.append(loop)
            self._spawn(name, loop.run)

    def _spawn(self, name: str, body: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                body()
            except Exception as error:  # a defect of ours: it ends the run, and says so
                self.finish(Outcome(
                    Kind.HOST_ERROR,
                    detail=f"internal error in {name}: {type(error).__name__}: {error} "
                    f"({_place(error)})",
                ))

        # Daemon: a thread stuck in a dead disk's system call must not keep the process alive.
        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)  # before it can ask whether it is one of them
        thread.start()

    def _stop(self) -> None:
        self._stopping = True
        for io_loop in self._io_loops:
            io_loop.stop()
        os.eventfd_write(self._stop_fd, 1)
        until_s = time.monotonic() + JOIN_TIMEOUT_S
        self._vcpus.stop()
        for thread in self._threads:
            if thread.is_alive():  # one that could not be started cannot be joined
                thread.join(max(0.0, until_s - time.monotonic()))
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if stuck:
            self._report(f"{', '.join(stuck)} did not stop within {JOIN_TIMEOUT_S:g} s")

    @property
    def stopped(self) -> bool:
        """Whether no thread of the run is left; only then may what they use be closed."""
        return not any(thread.is_alive() for thread in self._threads)


def _place(error: Exception) -> str:
    """Where ``error`` was raised, ``file:line``."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "nowhere"


def _read_input(fd: int) -> bytes | None:
    """What was typed; None at the end of the input."""
    try:
        return os.read(fd, 1024) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None  # the terminal hung up
