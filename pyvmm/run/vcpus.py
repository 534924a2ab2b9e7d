"""All vCPUs of a run together: stopping, pausing and inspecting them, and when to inspect.

A vCPU is reached by a flag, then ``immediate_exit`` in its run page, then a signal to its thread:
whichever side of KVM_RUN the thread is on, it comes out and looks at its flags.  So what is here
costs an exit nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence

from pyvmm.run.vcpu_loop import VcpuLoop

ANNOUNCED_S = 10.0
ANNOUNCED_POLL_S = 0.05
FIRST_WINDOW_S, LONGEST_WINDOW_S = 2.0, 8.0
QUIET_SHARE = 0.01
"""A guest that uses less of one CPU than this, over a whole window, may have halted."""
REGULAR_S = 30.0
"""How long one that uses more is left alone: it may have halted with a timer of its left on."""


class Vcpus:
    """The vCPUs of one run and their threads; its methods may be called from any thread.

    ``kick_signal`` interrupts a KVM_RUN; it has a handler for as long as the vCPUs run.
    """

    def __init__(self, kick_signal: int) -> None:
        self._kick_signal = kick_signal
        # Re-entrant: a handler of a signal that arrives under it may call resume().
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        """One more is parked, or there is nothing to wait for any more."""
        self._gate = threading.Condition(self._lock)
        """The parked may go."""
        self._loops: list[VcpuLoop] = []
        # Of each thread that is in ``run``, by its ident.  A thread enters itself and takes itself
        # out, under the lock: it can be signalled there, and its clock read.
        self._cpu_clocks: dict[int, int] = {}
        self._parked = 0
        self._is_over = False
        self.is_paused = False
        """Whether a pause was asked for; ``wait_until_parked`` says when it holds."""

    def begin(self, loops: Sequence[VcpuLoop]) -> None:
        """These are the vCPUs; if a pause was asked for before, they park before they run."""
        with self._lock:
            self._loops += loops
            for loop in loops:
                loop.wait_while_paused = self._wait_while_paused
                if self.is_paused:
                    loop.vcpu.request_exit()

    def run(self, loop: VcpuLoop) -> None:
        """Run ``loop``, one of them, to its end in the calling thread."""
        ident = threading.get_ident()
        with self._lock:
            self._cpu_clocks[ident] = time.pthread_getcpuclockid(ident)
        try:
            loop.run()
        finally:
            with self._lock:
                del self._cpu_clocks[ident]

    def stop(self) -> None:
        """Make every ``run`` return, a parked one too; pauses are over for good."""
        with self._lock:
            for loop in self._loops:
                loop.stopping = True
            self._kick()
            self._is_over, self.is_paused = True, False
            self._news.notify_all()
            self._gate.notify_all()

    def begin_pause(self) -> None:
        """Ask every vCPU to park; does not wait.  Nothing once the run is over."""
        with self._lock:
            if not self.is_paused and not self._is_over:
                self.is_paused = True
                self._kick()

    def wait_until_parked(self, timeout_s: float | None) -> bool:
        """Wait until every vCPU is parked, if there are any yet; whether they are.

        False after ``timeout_s`` seconds, once the run is over, and if somebody resumes it.
        """
        with self._lock:
            self._news.wait_for(lambda: not self.is_paused or self._are_parked(), timeout_s)
            return self.is_paused and self._are_parked()

    def resume(self) -> None:
        """Let every parked vCPU go on; nothing if none is."""
        with self._lock:
            self.is_paused = False
            self._news.notify_all()
            self._gate.notify_all()

    def inspect(self) -> None:
        """Make every vCPU look whether it has halted for good; the last one ends the run if all
        have.  Not while they are paused."""
        with self._lock:
            for loop in self._loops:
                loop.is_halted = False
                loop.inspect = True
            self._kick()

    def cpu_time_s(self) -> float:
        """CPU time that the vCPUs under way have used, their guests' included."""
        with self._lock:
            return sum(map(time.clock_gettime, self._cpu_clocks.values()))

    def _kick(self) -> None:
        """Bring every vCPU out of KVM_RUN; under the lock."""
        if self._is_over:
            return  # the run pages may be gone
        for loop in self._loops:
            loop.vcpu.request_exit()
        for ident in self._cpu_clocks:
            signal.pthread_kill(ident, self._kick_signal)

    def _are_parked(self) -> bool:
        return self._parked == len(self._loops)

    def _wait_while_paused(self) -> bool:
        """Park the calling vCPU's thread; whether there was a pause."""
        with self._lock:
            if not self.is_paused:
                return False
            self._parked += 1
            self._news.notify_all()
            self._gate.wait_for(lambda: not self.is_paused)
            self._parked -= 1
            return True


class HaltWatch:
    """Says when to inspect whether the guest has halted for good.  Times are CLOCK_MONOTONIC.

    An inspection kicks every vCPU, and a guest that is kicked again and again gets nowhere.  So it
    is worth one in three cases only.  For a while after the guest has announced that it halts.
    When its vCPUs have used next to no CPU time for a whole window: it is idle, or has halted
    without a word.  Each such window is twice as long as the one before, for most guests are idle;
    each that has seen the guest work halves the next.  And when there was none for REGULAR_S: a
    kick so seldom disturbs nobody.
    """

    def __init__(self, now_s: float) -> None:
        self._announced_until_s = now_s
        self.due_s = now_s
        """When to ask the next time."""
        self.start_anew(now_s, 0.0)

    def start_anew(self, now_s: float, cpu_time_s: float) -> None:
        """Nothing can be said of the guest's last while: it is paused, say."""
        self._window_s = FIRST_WINDOW_S
        self._since_s, self._used_s = now_s, cpu_time_s
        self._inspected_s = now_s
        self.due_s = now_s + FIRST_WINDOW_S

    def announce(self, now_s: float) -> None:
        """The guest says that it halts."""
        self._announced_until_s = now_s + ANNOUNCED_S
        self.due_s = now_s

    def is_worth_it(self, now_s: float, cpu_time_s: float) -> bool:
        """Whether to inspect now, when it is due; ``cpu_time_s`` is what all vCPUs have used."""
        if now_s < self._announced_until_s:
            self.due_s = now_s + ANNOUNCED_POLL_S
            self._inspected_s = now_s
            return True
        is_quiet = cpu_time_s - self._used_s < QUIET_SHARE * (now_s - self._since_s)
        window_s = self._window_s * 2 if is_quiet else self._window_s / 2
        self._window_s = min(max(window_s, FIRST_WINDOW_S), LONGEST_WINDOW_S)
        self._since_s, self._used_s = now_s, cpu_time_s
        self.due_s = now_s + self._window_s
        if not is_quiet and now_s - self._inspected_s < REGULAR_S:
            return False
        self._inspected_s = now_s
        return True
