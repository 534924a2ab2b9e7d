"""Pausing a run: its vCPUs, the threads of its devices, and who may let them go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyvmm.run.io_loop import IoLoop
from pyvmm.run.threads import left_s
from pyvmm.run.vcpus import Vcpus


class Stillness:
    """Pauses ``vcpus`` and the loops of ``add``; ``house`` is the loop that keeps house.

    All methods may be called from any thread; those that wait, not in a thread of the run.

    Between ``hold`` and ``let_go`` the guest stays quiesced, whoever pauses or resumes it: what
    they ask for holds from ``let_go`` on.
    """

    def __init__(self, vcpus: Vcpus, house: IoLoop) -> None:
        self.is_quiesced = False
        """True if ``quiesce`` was asked for and not taken back."""
        # Re-entrant: a handler of a signal that arrives under it may call resume().
        self._lock = threading.RLock()
        self._vcpus = vcpus
        self._house = house
        self._loops: list[IoLoop] = []
        self.is_held = False
        """True between ``hold`` and ``let_go``."""
        self._stays_paused = self._stays_quiesced = False
        """The state that ``let_go`` leaves."""

    def add(self, loop: IoLoop) -> None:
        """Park ``loop``, of a thread of a device, with the others; before it runs."""
        with self._lock:
            self._loops.append(loop)
            if self.is_quiesced:
                loop.begin_park()

    def begin_pause(self) -> None:
        """Ask every vCPU to pause, without waiting for it."""
        with self._lock:
            self._stays_paused = True
            self._vcpus.begin_pause()

    def pause(self, timeout_s: float | None) -> bool:
        """See ``Runner.pause``."""
        self.begin_pause()
        return self._vcpus.wait_until_parked(timeout_s)

    def quiesce(self, timeout_s: float | None) -> bool:
        """See ``Runner.quiesce``."""
        with self._lock:
            self._stays_paused = self._stays_quiesced = True
            loops = self._begin_quiesce()
        return self._wait_until_still(loops, timeout_s)

    def resume(self) -> None:
        """See ``Runner.resume``."""
        with self._lock:
            self._stays_paused = self._stays_quiesced = False
            if not self.is_held:
                self._go_on()

    def hold(self, timeout_s: float | None) -> bool:
        """Quiesce the guest and hold it so: True until ``let_go``, which then must be called.

        False, and nothing held, where ``Runner.quiesce`` returns False.
        """
        is_ours = is_still = False
        try:
            with self._lock:
                if self.is_held:
                    raise RuntimeError("the machine is being saved or rewound already")
                self._stays_paused, self._stays_quiesced = self._vcpus.is_paused, self.is_quiesced
                is_ours = self.is_held = True
                loops = self._begin_quiesce()
            is_still = self._wait_until_still(loops, timeout_s)
        finally:  # also after a KeyboardInterrupt
            if is_ours and not is_still:
                self.let_go()
        return is_still

    def let_go(self) -> None:
        """Let the guest go on, or leave it paused or quiesced if that was asked for.

        Call it again if a KeyboardInterrupt ends it.
        """
        with self._lock:
            self.is_held = False
            if not self._stays_quiesced:
                self._go_on(paused=self._stays_paused)

    @property
    def is_still(self) -> bool:
        """See ``Runner.is_still``."""
        return (
            self.is_quiesced
            and self._vcpus.wait_until_parked(0.0)
            and all(loop.wait_until_parked(0.0) for loop in self._loops)
        )

    def stop_loops(self) -> None:
        """End every loop of ``add``."""
        for loop in self._loops:
            loop.stop()

    def _begin_quiesce(self) -> list[IoLoop]:
        self.is_quiesced = True
        self._vcpus.begin_pause()
        for loop in self._loops:
            loop.begin_park()
        return list(self._loops)

    def _wait_until_still(self, loops: list[IoLoop], timeout_s: float | None) -> bool:
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        parked: list[Callable[[float | None], bool]] = [
            self._vcpus.wait_until_parked, *(loop.wait_until_parked for loop in loops),
            # The house may have been handing over a byte when this began.
            self._house.wait_for_pass,
        ]
        return all(wait(left_s(until_s)) for wait in parked) and self._vcpus.wait_until_parked(0.0)

    def _go_on(self, *, paused: bool = False) -> None:
        was_quiesced, self.is_quiesced = self.is_quiesced, False
        for loop in self._loops:
            loop.resume()
        if not paused:
            self._vcpus.resume()
        if was_quiesced:
            self._house.wake()  # for typed bytes that wait
