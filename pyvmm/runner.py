"""Running a machine: with ``serving.py``, the only place that starts threads or handles signals.

One thread a vCPU sits in KVM_RUN, one thread an I/O worker waits for its devices' ioeventfds, and
the main thread moves console bytes, watches the clock and takes signals.  The first ``finish()``
decides the outcome; every thread is then kicked, stopped and joined.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from pyvmm.console import HELP, Console, EscapeFilter, OutputBuffer, RawTerminal
from pyvmm.io_loop import IoLoop, IoSource
from pyvmm.outcome import Kind, Outcome
from pyvmm.report import Reporter
from pyvmm.vcpu_loop import VcpuLoop

KICK_SIGNAL = signal.SIGRTMIN
REFRESH_SIGNAL = signal.SIGUSR1
"""Look at the disks again: a file may have grown."""
RESIZE_SIGNAL = signal.SIGWINCH
"""The terminal has another size."""
NOTICE_SIGNALS = (REFRESH_SIGNAL, RESIZE_SIGNAL)
STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU
)
JOIN_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 2.0
HALT_WATCH_S = 10.0
HALT_POLL_S = 0.05
LONGEST_POLL_S = 3600.0  # poll takes a C int of milliseconds
GATHER_S, STREAM_GATHER_S = 0.01, 0.05
"""How long console bytes may gather before they are shown: an echo, and one of many in a row."""
INPUT_LIMIT = 4096


class Runner:
    """Runs vCPUs, I/O workers and the console until somebody calls ``finish``.

    ``finish`` and ``wake`` may be called from any thread, all else belongs to the main thread.
    """

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Appending is atomic, so also safe in a signal handler that interrupts an append.
        self._outcomes: list[Outcome] = []
        self._stopping = False
        self._deadlines: list[tuple[float, Outcome]] = []
        self._halt_watch_until_s = 0.0
        self._next_inspection_s = 0.0
        self._gathering_since_s: float | None = None
        self._gather_s = GATHER_S
        self._shown_s = 0.0
        self._input_waits = False
        self._noticed: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._vcpus: list[tuple[VcpuLoop, threading.Thread]] = []
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
        self._deadlines.append((time.monotonic() + delay_s, outcome))
        self.wake()

    def watch_for_halt(self) -> None:
        """The guest said that it halts: end the run once all vCPUs have, with interrupts off."""
        self._halt_watch_until_s = time.monotonic() + HALT_WATCH_S

    def run(
        self,
        *,
        vcpus: Sequence[VcpuLoop],
        workers: Sequence[tuple[str, Sequence[IoSource]]],
        console: Console,
        output: OutputBuffer,
        receive: Callable[[bytes], int],
        notices: Mapping[int, Callable[[], None]] = MappingProxyType({}),
    ) -> Outcome:
        """Run to the end; every thread is stopped and the terminal restored when this returns.

        ``workers`` are ``(thread name, sources)``: a thread each, so that one disk that waits
        never holds up another.  ``receive`` takes typed bytes and says how many it took;
        ``notices`` are called, on this thread, after a signal among NOTICE_SIGNALS.
        """
        switch_interval_s = sys.getswitchinterval()
        # A busy Python thread keeps the GIL for this long; 5 ms would starve the vCPU.
        sys.setswitchinterval(1e-4)
        try:
            with (
                Signals(self._on_signal) as signals,
                RawTerminal(-1 if console.input_fd is None else console.input_fd) as terminal,
            ):
                try:
                    self._start(vcpus, workers)
                    self._main_loop(
                        console, output, receive, terminal.active, signals.wakeup_fd, notices
                    )
                finally:
                    output.shut()
                    self._stop()
                self._drain(output)
        finally:
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
        receive: Callable[[bytes], int],
        interactive: bool,
        signal_fd: int,
        notices: Mapping[int, Callable[[], None]],
    ) -> None:
        escapes = EscapeFilter(
            on_quit=lambda: self.finish(Outcome(Kind.QUIT)),
            on_help=lambda: output.write(HELP.encode(), wait=False),
        )
        typed = bytearray()
        input_fd = console.input_fd
        while not self._stopping:
            poller = select.poll()
            poller.register(self._wake_fd, select.POLLIN)
            poller.register(signal_fd, select.POLLIN)
            # A terminal is read even while the guest is not listening, or Ctrl-A x would not work.
            if input_fd is not None and (interactive or len(typed) < INPUT_LIMIT):
                poller.register(input_fd, select.POLLIN)
            if output.fd is None:
                self._give_to_observer(output)
            show = self._is_time_to_show(output)
            if show and output.fd is not None:
                poller.register(output.fd, select.POLLOUT)
            ready = dict(poller.poll(self._poll_timeout_ms(shows=show)))
            if self._wake_fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
            if signal_fd in ready:
                os.read(signal_fd, 4096)  # the handler has run by now
                while self._noticed:
                    if notice := notices.get(self._noticed.pop()):
                        notice()
            if show and output.fd in ready:
                self._drain_once(output)
                self._gathering_since_s, self._shown_s = None, time.monotonic()
            if input_fd is not None and input_fd in ready:
                data = _read_input(input_fd)
                if data is None:
                    input_fd, data = None, b""
                typed += escapes.feed(data) if interactive else data
                if len(typed) > 256 * INPUT_LIMIT:
                    del typed[256 * INPUT_LIMIT :]
            if typed:
                # Set before asking: room that comes after the answer makes another wake-up.
                self._input_waits = True
                del typed[: receive(bytes(typed))]
                self._input_waits = bool(typed)
            self._check_clock()

    def _give_to_observer(self, output: OutputBuffer) -> None:
        """Nobody takes console bytes: a panic among them is to be seen all the same."""
        while output.pending:
            output.drain()
        self._gathering_since_s = None

    def _is_time_to_show(self, output: OutputBuffer) -> bool:
        """Whether console bytes wait and have gathered for long enough."""
        if not output.pending:
            return False
        now_s = time.monotonic()
        if self._gathering_since_s is None:
            self._gathering_since_s = now_s
            streams = now_s < self._shown_s + 2 * STREAM_GATHER_S
            self._gather_s = STREAM_GATHER_S if streams else GATHER_S
        return output.has_chunk or now_s >= self._gathering_since_s + self._gather_s

    def _poll_timeout_ms(self, *, shows: bool) -> int | None:
        """How long to wait; what is being shown waits for the terminal, not for the clock."""
        waits_s = [at_s for at_s, _ in self._deadlines]
        if self._gathering_since_s is not None and not shows:
            waits_s.append(self._gathering_since_s + self._gather_s)
        if self._halt_watch_until_s:
            waits_s.append(self._next_inspection_s)
        if not waits_s:
            return None
        left_s = min(max(0.0, min(waits_s) - time.monotonic()), LONGEST_POLL_S)
        return int(left_s * 1000) + 1

    def _check_clock(self) -> None:
        now_s = time.monotonic()
        for at_s, outcome in self._deadlines:
            if now_s >= at_s:
                self.finish(outcome)
        if self._halt_watch_until_s and now_s >= self._next_inspection_s:
            # Not at every turn of this loop: a kick's signal wakes this thread too, and a guest
            # that is kicked again and again gets nowhere.
            self._next_inspection_s = now_s + HALT_POLL_S
            if now_s >= self._halt_watch_until_s:
                self._halt_watch_until_s = 0.0
            for loop, _ in self._vcpus:
                loop.is_halted = False
                loop.inspect = True
            self._kick()

    def _drain_once(self, output: OutputBuffer) -> None:
        try:
            output.drain()
        except BrokenPipeError:
            output.fd = None
            self.finish(Outcome(Kind.SIGNAL, signal.SIGPIPE, "nobody reads the console any more"))
        except OSError as error:
            output.fd = None
            self._report(f"console output is lost from here on: {error.strerror}")

    def _drain(self, output: OutputBuffer) -> None:
        """The last of the console's output, for as long as the host takes it."""
        until_s = time.monotonic() + DRAIN_TIMEOUT_S
        while output.pending and time.monotonic() < until_s:
            if output.fd is not None:
                poller = select.poll()
                poller.register(output.fd, select.POLLOUT)
                if not poller.poll(100):
                    continue
            self._drain_once(output)
        output.give_up()

    def _on_signal(self, number: int) -> None:
        if number in NOTICE_SIGNALS:
            self._noticed.add(number)
            return
        self.finish(Outcome(Kind.SIGNAL, number, signal.Signals(number).name))

    # Threads -----------------------------------------------------------------------------------

    def _start(
        self, vcpus: Sequence[VcpuLoop], workers: Sequence[tuple[str, Sequence[IoSource]]]
    ) -> None:
        # The guest first: what it rings for before the others are there waits in an eventfd.
        for index, vcpu in enumerate(vcpus):
            self._vcpus.append((vcpu, self._spawn(f"vcpu{index}", vcpu.run)))
        for name, sources in workers:
            loop = IoLoop(sources, self._stop_fd)
            self._io_loops.append(loop)
            self._spawn(name, loop.run)

    def _spawn(self, name: str, body: Callable[[], None]) -> threading.Thread:
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
        thread.start()
        self._threads.append(thread)
        return thread

    def _kick(self) -> None:
        for loop, thread in self._vcpus:
            if thread.is_alive() and thread.ident is not None:
                loop.vcpu.request_exit()
                with contextlib.suppress(ProcessLookupError):
                    signal.pthread_kill(thread.ident, KICK_SIGNAL)

    def _stop(self) -> None:
        self._stopping = True
        for loop, _ in self._vcpus:
            loop.stopping = True
        for io_loop in self._io_loops:
            io_loop.stop()
        os.eventfd_write(self._stop_fd, 1)
        until_s = time.monotonic() + JOIN_TIMEOUT_S
        self._kick()
        for thread in self._threads:
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


class Signals:
    """Signal handlers for the length of a run; the previous ones come back afterwards.

    ``wakeup_fd`` becomes readable at every signal: the kernel may hand one to any thread, and
    then nothing else interrupts the main thread's poll.
    """

    def __init__(self, on_stop: Callable[[int], None], *, raw_terminal: bool = True) -> None:
        self._on_stop = on_stop
        self._raw_terminal = raw_terminal
        self._saved: dict[int, object] = {}
        self._previous_wakeup_fd = -1
        self.wakeup_fd = self._wakeup_write_fd = -1

    def __enter__(self) -> Signals:
        self.wakeup_fd, self._wakeup_write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous_wakeup_fd = signal.set_wakeup_fd(
            self._wakeup_write_fd, warn_on_full_buffer=False
        )
        for number in (*STOP_SIGNALS, *NOTICE_SIGNALS):
            # What was ignored stays ignored (nohup, a shell's background job).
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._saved[number] = signal.signal(number, lambda n, _f: self._on_stop(n))
        if self._raw_terminal:
            # Stopped with a raw terminal, the shell that takes over would be unusable.
            self._saved[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        # The handler need do nothing: that the signal arrives is what interrupts KVM_RUN.
        self._saved[KICK_SIGNAL] = signal.signal(KICK_SIGNAL, lambda _n, _f: None)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._saved.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._saved.clear()
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self.wakeup_fd)
        os.close(self._wakeup_write_fd)
