"""All vCPUs of a run together: stopping, pausing and inspecting them.

To reach a vCPU, set a flag, then ``immediate_exit`` in its run page, then signal its thread.  On
whichever side of KVM_RUN the thread is, it comes out and looks at its flags.  So an exit pays
nothing for what this file offers.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence

from pyvmm.run.vcpu_loop import VcpuLoop


class Vcpus:
    """The vCPUs of one run and their threads; its methods may be called from any thread.

    ``kick_signal`` interrupts a KVM_RUN; it has a handler for as long as the vCPUs run.
    """

    def __init__(self, kick_signal: int) -> None:
        self._kick_signal = kick_signal
        # Re-entrant: a handler of a signal that arrives under it may call resume().
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        """One more vCPU is parked, or there is nothing to wait for any more."""
        self._gate = threading.Condition(self._lock)
        """Parked vCPUs may go on."""
        self._loops: list[VcpuLoop] = []
        # Of each thread that is in ``run``, by its ident.  A thread enters itself and takes itself
        # out, under the lock: it can be signalled there, and its clock read.
        self._cpu_clocks: dict[int, int] = {}
        self._parked = 0
        self._is_over = False
        self.is_paused = False
        """True if a pause was asked for; ``wait_until_parked`` says when it holds."""

    def begin(self, loops: Sequence[VcpuLoop]) -> None:
        """Take the vCPUs; if a pause was asked for before, they park before they run."""
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
        """Wait until every vCPU is parked, if there are any yet; return True then.

        False after ``timeout_s`` seconds, once the run is over, and if somebody resumes it.
        """
        with self._lock:
            self._news.wait_for(lambda: not self.is_paused or self._are_parked(), timeout_s)
            return self.is_paused and self._are_parked()

    def resume(self) -> None:
        """Let every parked vCPU go on; do nothing if none is parked."""
        with self._lock:
            self.is_paused = False
            self._news.notify_all()
            self._gate.notify_all()

    def inspect(self) -> None:
        """Make every vCPU look whether it has halted for good; the last one ends the run if all
        have.  Do not call it while they are paused."""
        with self._lock:
            for loop in self._loops:
                loop.is_halted = False
                loop.inspect = True
            self._kick()

    def cpu_time_s(self) -> float:
        """Return the CPU time that the running vCPUs have used, the guest's included."""
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
        """Park the calling vCPU's thread while paused; return True if there was a pause."""
        with self._lock:
            if not self.is_paused:
                return False
            self._parked += 1
            self._news.notify_all()
            self._gate.wait_for(lambda: not self.is_paused)
            self._parked -= 1
            return True
