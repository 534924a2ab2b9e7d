"""Pausing a run, as everybody outside it does."""

from __future__ import annotations

import abc

from pyvmm.run.stillness import Stillness
from pyvmm.run.vcpus import Vcpus


class PausableRun(abc.ABC):
    """A run whose vCPUs, and the threads of its devices, can be paused from any other thread."""

    _vcpus: Vcpus
    _stillness: Stillness

    @abc.abstractmethod
    def refuse_own_threads(self, call: str) -> None:
        """Raise RuntimeError in a thread of the run, where ``call`` would wait for itself."""

    def begin_pause(self) -> None:
        """Ask every vCPU to pause, without waiting for it; see ``pause``."""
        self._stillness.begin_pause()

    def pause(self, timeout_s: float | None = None) -> bool:
        """Pause the guest: True once every vCPU has left KVM_RUN and waits for ``resume``.

        Before the run, return True at once: the guest will start paused.  False, without a pause,
        if the run is over or ends meanwhile, even by a vCPU that fails, or if another thread
        resumes the guest.  False too after ``timeout_s`` seconds (None: no limit): a vCPU at a
        device, say at a full console, parks only when its access is done.  Then the pause stays
        asked for, and no vCPU enters the guest.

        RuntimeError in a thread of the run: it would wait for itself, or for a thread that needs
        it.

        Time goes on: the host's clock, the guest's, ``finish_after``.  Whatever ends a run ends a
        paused one.  The threads of the devices go on too and serve the requests in the rings.
        Interrupts, those of the timers in KVM too, wait for the guest.  kvm-clock tells the guest
        of the pause, so that its watchdogs see no lock-up.
        """
        self.refuse_own_threads("pause()")
        return self._stillness.pause(timeout_s)

    def quiesce(self, timeout_s: float | None = None) -> bool:
        """Pause the guest and park the threads of its devices: True once nothing of it moves.

        Then no request is served, no typed byte is handed over and nobody writes guest RAM, until
        ``resume``.  The thread that keeps house goes on: it shows what the guest has printed, and
        deadlines end the run.  False, timeouts and errors are as for ``pause``; a device thread
        parks when its pass is done.
        """
        self.refuse_own_threads("quiesce()")
        return self._stillness.quiesce(timeout_s)

    def resume(self) -> None:
        """Let a paused or quiesced guest go on; nothing if it is neither.  Once is enough."""
        self._stillness.resume()

    def hold(self, call: str, timeout_s: float | None = None) -> bool:
        """Quiesce the guest for ``call``, whoever resumes it meanwhile, until ``let_go``.

        False, and nothing held, where ``quiesce`` returns False.
        """
        self.refuse_own_threads(call)
        return self._stillness.hold(timeout_s)

    def let_go(self) -> None:
        """End a ``hold``: the guest is as it was before, or as others asked for meanwhile."""
        self._stillness.let_go()

    @property
    def is_held(self) -> bool:
        """True between ``hold`` and ``let_go``."""
        return self._stillness.is_held

    @property
    def is_quiesced(self) -> bool:
        """True if ``quiesce`` was asked for and not taken back."""
        return self._stillness.is_quiesced

    @property
    def is_still(self) -> bool:
        """True while the guest is quiesced: each vCPU and each thread of a device is parked."""
        return self._stillness.is_still

    @property
    def is_paused(self) -> bool:
        """True if a pause was asked for and not taken back."""
        return self._vcpus.is_paused
