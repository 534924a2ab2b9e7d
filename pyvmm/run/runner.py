"""Running a machine: its threads, its deadlines, and its end.

Each vCPU has a thread that sits in KVM_RUN, and each I/O worker has a thread that waits for its
devices' ioeventfds.  One more thread keeps house: it moves console bytes and watches the clock.
The house's thread may be the caller's or one of the run's own.  The first ``finish()`` decides the
outcome; every thread is then kicked, stopped and joined.

A run touches neither the process's signals (but for the handler of KICK_SIGNAL, which does
nothing) nor its terminal.  ``cli/session.py`` does that for a person at a command line.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

from pyvmm.console.output import DRAIN_TIMEOUT_S, STALL_S, OutputBuffer, OutputPump
from pyvmm.console.place import Console
from pyvmm.run.console_output import PluggedOutput
from pyvmm.run.halts import HaltWatch
from pyvmm.run.io_loop import Deadline, IoLoop, IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.pausing import PausableRun
from pyvmm.run.signals import KICK_SIGNAL, KickHandler
from pyvmm.run.stillness import Stillness
from pyvmm.run.threads import OneRun, RunThreads, culprit_of, do_all, place_of
from pyvmm.run.vcpu_loop import VcpuLoop
from pyvmm.run.vcpus import Vcpus

JOIN_TIMEOUT_S = 5.0
ASKED_FOR = (Kind.QUIT, Kind.STOPPED, Kind.TIMEOUT, Kind.SIGNAL)
"""Ends that somebody outside asked for: nobody then waits for a reader of the console."""


class Runner(PausableRun):
    """Runs vCPUs, I/O workers and the console until somebody calls ``finish``; once.

    Once, that is, unless ``run_again`` has it run on from a state of before.

    Either ``run`` in the thread that keeps house, or ``start`` and ``wait``.  All methods may be
    called from any thread.  A method that waits raises RuntimeError in the run's own threads,
    because such a thread would wait for itself.

    ``loop`` runs in the thread that keeps house and serves there any source that a part plugs in.
    ``on_wake`` adds a call for every ``wake``.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self._workers_wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._looks: list[Callable[[], None]] = []
        self._at_over: list[Callable[[], None]] = []
        try:
            self.loop = IoLoop(woken=self._look)
        except OSError:
            os.close(self._workers_wake_fd)
            raise
        self.input_waits = False
        """True if typed bytes wait for room in the guest; whoever holds the bytes sets it."""
        self._has_begun = threading.Lock()
        self._house: threading.Thread | None = None
        """The thread that keeps house, while it does."""
        self._prepare()

    def _prepare(self) -> None:
        """Make what one run needs for itself."""
        self._this_run = OneRun(self.loop.stop)
        self._halts = HaltWatch(time.monotonic())
        self._next_halt_check = self.loop.call_at(self._halts.due_s, self._check_halts)
        self._threads = RunThreads(self._fail_in)
        self._vcpus = Vcpus(KICK_SIGNAL)
        self._stillness = Stillness(self._vcpus, self.loop)

    # The end

    def finish(self, outcome: Outcome) -> None:
        """End the run with ``outcome``; the first call wins.  Does not wait."""
        self._this_run.finish(outcome)

    def finish_after(self, delay_s: float, outcome: Outcome) -> Deadline:
        """End the run with ``outcome`` in ``delay_s`` seconds, if nothing else ended it before."""
        return self.call_after(delay_s, functools.partial(self.finish, outcome))

    def call_after(self, delay_s: float, callback: Callable[[], None]) -> Deadline:
        """Call ``callback`` once, in the thread that keeps house, in ``delay_s`` seconds."""
        return self.loop.call_at(time.monotonic() + delay_s, callback)

    def forget_halts(self) -> None:
        """Take back ``watch_for_halt``: the guest is another one now; by ``in_house``."""
        self._halts.forget(time.monotonic(), self._vcpus.cpu_time_s())

    def in_house(self, action: Callable[[], None]) -> None:
        """Do ``action`` in the thread that keeps house, and wait; at once if none does.

        Nothing else is shown, timed or handed over meanwhile.  Errors are the caller's.
        """
        errors: list[BaseException] = []

        def act() -> None:
            try:
                action()
            except BaseException as error:
                errors.append(error)

        self.loop.do_between_passes(act)
        if errors:
            raise errors[0]

    def watch_for_halt(self) -> None:
        """End the run once all vCPUs halt with interrupts off: the guest said that it halts."""
        self.loop.call_soon(self._announce_halt)

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Return the outcome once the run is over and every thread of it was stopped; None after
        ``timeout_s`` seconds."""
        self.refuse_own_threads("wait()")
        return self._this_run.wait(timeout_s)

    def stop(self, outcome: Outcome) -> Outcome | None:
        """End the run with ``outcome``, wait for the end, and return the outcome of the run.

        None if the run never began; should it begin later, it ends at once.
        """
        self.refuse_own_threads("stop()")
        run = self._this_run  # which another thread may rewind, so that there is another one
        run.finish(outcome)
        return run.wait(None) if self._has_begun.locked() else None

    # The console

    def wake(self) -> None:
        """Have the house look again for console bytes to move and for room for input."""
        self.loop.wake()

    def input_room(self) -> None:
        """Hand over waiting typed bytes, if any: the guest has room again."""
        if self.input_waits:
            self.loop.wake()

    def on_wake(self, look: Callable[[], None]) -> None:
        """Have ``look`` called in the thread that keeps house, at the start and after ``wake``."""
        self._looks.append(look)

    def when_over(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called once every thread of the run was stopped; before the run."""
        self._at_over.append(tell)

    # The state of the run

    @property
    def has_begun(self) -> bool:
        """True once the run was asked for, and after its end."""
        return self._has_begun.locked()

    @property
    def is_ending(self) -> bool:
        """True once ``finish`` was called."""
        return bool(self._this_run.outcomes)

    @property
    def is_over(self) -> bool:
        """True once the run has ended and its threads were stopped."""
        return self._this_run.is_over.is_set()

    @property
    def has_resting_vcpus(self) -> bool:
        """True while no vCPU can be in the guest: before the run, in a pause, and afterwards."""
        if not self.has_begun:
            return True
        if self.is_over:
            return not self._threads.are_alive
        return self._vcpus.wait_until_parked(0.0)

    # Running

    def start(
        self,
        *,
        vcpus: Sequence[VcpuLoop],
        workers: Sequence[tuple[str, Sequence[IoSource]]],
        console: Console,
        output: OutputBuffer,
        at_end: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Start the machine, and a thread that keeps house; the arguments are those of ``run``.

        When this raises, no thread is left.
        """
        self._begin()
        self._start(vcpus, workers, console, output, at_end)

    def run_again(
        self,
        *,
        vcpus: Sequence[VcpuLoop],
        workers: Sequence[tuple[str, Sequence[IoSource]]],
        console: Console,
        output: OutputBuffer,
        at_end: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Start anew, paused, after the end of the run; the arguments are those of ``run``.

        Before it, ``on_wake`` and ``when_over`` must be given again what they were given.
        RuntimeError while anything of the last run is left.
        """
        if not (self.is_over and self.stopped):
            raise RuntimeError("a run begins anew only when it is over and its threads are gone")
        self.loop = IoLoop(woken=self._look)
        self._prepare()
        self._stillness.begin_pause()
        for vcpu in vcpus:
            vcpu.run_again()
        output.reopen(console.output_fd)
        self._start(vcpus, workers, console, output, at_end)

    def _start(
        self,
        vcpus: Sequence[VcpuLoop],
        workers: Sequence[tuple[str, Sequence[IoSource]]],
        console: Console,
        output: OutputBuffer,
        at_end: Sequence[Callable[[], None]],
    ) -> None:
        self._set_up(console, output, at_end)

        def keep_house() -> None:
            self._house = threading.current_thread()
            try:
                self.loop.run()
            except BaseException as error:
                self._fail_in("the house's thread", error)
            self._end()

        try:
            self._start_threads(vcpus, workers)
            self._this_run.house = threading.Thread(target=keep_house, name="house", daemon=True)
            self._this_run.house.start()
        except BaseException as error:
            self._this_run.house = None
            self._fail_in("the start", error)
            self._end()
            raise

    def run(
        self,
        *,
        vcpus: Sequence[VcpuLoop],
        workers: Sequence[tuple[str, Sequence[IoSource]]],
        console: Console,
        output: OutputBuffer,
        at_end: Sequence[Callable[[], None]] = (),
    ) -> Outcome:
        """Run to the end and keep house in the calling thread; every thread is stopped then.

        ``workers`` are ``(thread name, sources)``: a thread each, so that one disk that waits
        never holds up another.  The calls in ``at_end`` are made before the threads are joined,
        because a thread may be waiting for a peer.
        """
        self._begin()
        self._set_up(console, output, at_end)
        self._house = threading.current_thread()
        try:
            self._start_threads(vcpus, workers)
            self.loop.run()
        except BaseException as error:
            self._fail_in("the run", error)
            raise
        finally:
            self._end()
        return self._this_run.outcomes[0]

    def close(self) -> None:
        """Close the runner's own eventfds; idempotent, before a run or after it."""
        self.loop.close()
        fd, self._workers_wake_fd = self._workers_wake_fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def stopped(self) -> bool:
        """True if no thread of the run is left; only then may its parts be closed."""
        own = self._this_run.house
        return not (self._threads.are_alive or (own is not None and own.is_alive()))

    # Keeping house

    def _look(self) -> None:
        for look in self._looks:
            look()

    def _announce_halt(self) -> None:
        self._halts.announce(time.monotonic())
        self._next_halt_check.cancel()
        self._check_halts()

    def _check_halts(self) -> None:
        now_s, cpu_time_s = time.monotonic(), self._vcpus.cpu_time_s()
        if self.is_paused:
            self._halts.start_anew(now_s, cpu_time_s)
        elif self._halts.is_worth_it(now_s, cpu_time_s):
            self._vcpus.inspect()
        self._next_halt_check = self.loop.call_at(self._halts.due_s, self._check_halts)

    def _lose_output(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self.finish(Outcome(Kind.SIGNAL, signal.SIGPIPE, "nobody reads the console any more"))
        else:
            self.report(f"console output is lost from here on: {error.strerror}")

    # Beginning and ending

    def _begin(self) -> None:
        if self._workers_wake_fd < 0:
            raise RuntimeError("this runner was closed")
        if not self._has_begun.acquire(blocking=False):
            raise RuntimeError("a runner runs once: make another")

    def _set_up(
        self, console: Console, output: OutputBuffer, at_end: Sequence[Callable[[], None]]
    ) -> None:
        self._console, self._output, self._at_end = console, output, at_end
        shown = None if console.screen is None else console.screen.queries.feed
        self._pump = OutputPump(output, self._lose_output, shown, console.has_reader)
        self.on_wake(PluggedOutput(self._pump, self.loop).look)
        if not console.has_reader():
            self.report(
                f"--console {console.name}: nobody reads this FIFO yet; once {output.LIMIT} bytes "
                "wait, the guest waits too"
            )
        KickHandler.begin()

    def _start_threads(
        self, vcpus: Sequence[VcpuLoop], workers: Sequence[tuple[str, Sequence[IoSource]]]
    ) -> None:
        # The guest first: a doorbell that it rings before the workers start waits in an eventfd.
        self._vcpus.begin(vcpus)
        for index, vcpu in enumerate(vcpus):
            self._threads.spawn(f"vcpu{index}", functools.partial(self._vcpus.run, vcpu))
        for name, sources in workers:
            loop = IoLoop(sources, self._workers_wake_fd)
            self._stillness.add(loop)
            self._threads.spawn(name, loop.run)

    def _fail_in(self, name: str, error: BaseException) -> None:
        self.finish(Outcome(
            Kind.HOST_ERROR,
            detail=f"{culprit_of(error)} in {name}: {type(error).__name__}: {error} "
            f"({place_of(error)})",
        ))

    def _end(self) -> None:
        """Stop and join every thread, and show the last of the output."""
        try:
            self._output.shut()
            do_all(self._at_end, self.report)
            self._stop_threads()
            is_hurried = self._this_run.outcomes[0].kind in ASKED_FOR
            is_all = self._pump.finish(STALL_S if is_hurried else DRAIN_TIMEOUT_S)
            if not (is_all or self._console.has_reader()):
                self.report(f"--console {self._console.name}: nobody has read this FIFO")
        finally:
            self._house = None
            self._looks.clear()  # no cycle of references keeps the machine's parts
            self._this_run.is_over.set()
            for tell in self._at_over:
                tell()
            self._at_over.clear()

    def _stop_threads(self) -> None:
        self._stillness.stop_loops()
        self._vcpus.stop()
        stuck = self._threads.join(JOIN_TIMEOUT_S)
        if stuck:
            self.report(f"{', '.join(stuck)} did not stop within {JOIN_TIMEOUT_S:g} s")
        else:
            KickHandler.end()

    def refuse_own_threads(self, call: str) -> None:
        """Raise RuntimeError in a thread of the run, where ``call`` would wait for itself."""
        if threading.current_thread() in (self._house, *self._threads):
            raise RuntimeError(f"{call} in a thread of the run would wait for ever: use another")
