"""The running machine as the control server sees it: all that a method may do to it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from pyvmm.api.vcpus import Registers, VcpuHandle
from pyvmm.control.agent_bridge import Port
from pyvmm.control.machine_saves import MachineSaves
from pyvmm.control.saves import Saves
from pyvmm.machine import Machine
from pyvmm.run.outcome import Outcome
from pyvmm.startup.types import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from uuid import UUID

MAX_TYPED_BYTES = 1 << 20
"""Bytes for the console that may wait until the guest reads them."""


class Target(Protocol):
    """A machine that is driven over a socket; every method returns at once."""

    facts: dict[str, object]
    """Of the machine, for ``status``: JSON values that do not change."""
    vcpu_count: int
    agent_port: Port | None
    """The port of the agent in the guest; None if the machine has none."""
    saves: Saves | None
    """The machine's snapshots and checkpoints; None if it cannot be saved."""
    sets_clock: bool
    """True if the agent of a clone must set its guest's date to this host's."""

    @property
    def clone_id(self) -> UUID | None:
        """The number of the clone that the machine is, another after each rewind."""

    def observe(self, console: Callable[[bytes], None], woken: Callable[[], None]) -> None:
        """Have ``console`` called with the guest's output, and ``woken`` when a pause may have
        begun or ended; both in a thread of the run."""

    def begin_pause(self) -> None:
        """Ask the guest to pause."""

    def resume(self) -> None:
        """Let the guest go on."""

    @property
    def is_paused(self) -> bool:
        """True if a pause was asked for and not taken back."""

    @property
    def is_at_rest(self) -> bool:
        """True while no vCPU can be in the guest."""

    def finish(self, outcome: Outcome) -> None:
        """End the run with ``outcome``, unless it has ended."""

    def refresh_disks(self) -> None:
        """Have the disks look how large they are."""

    def type(self, data: bytes) -> bool:
        """Type ``data`` at the console; False, and nothing is typed, if too much waits."""

    def registers(self, vcpu: int) -> Registers:
        """Return the registers of a vCPU; RuntimeError unless it is at rest."""

    def memory(self, gpa: int, length: int) -> bytes:
        """Return guest memory; GuestMemoryError unless it is all RAM."""

    def evidence(self) -> dict[str, object]:
        """Return all that is known of how far the guest came: JSON values."""


class MachineTarget:
    """``machine`` as a ``Target``; made before its run."""

    def __init__(
        self, machine: Machine, config_facts: dict[str, object], *, sets_clock: bool = False
    ) -> None:
        self._machine = machine
        self._runner = machine.runner
        self._vcpus = [VcpuHandle(loop, machine.runner) for loop in machine.loops]
        self._typed = bytearray()
        self._lock = threading.Lock()
        self.vcpu_count = len(self._vcpus)
        self.agent_port: Port | None = machine.agent_port
        self.saves: Saves | None = MachineSaves(machine, self._attach)
        self.sets_clock = sets_clock
        self._woken: Callable[[], None] = lambda: None
        version = machine.kernel.version
        self.facts = {
            **config_facts,
            "kernel_version": version,
            "kernel_release": version.split(" ", 1)[0],
            "is_linux": machine.kernel.is_linux,
            "started_s": time.clock_gettime(time.CLOCK_BOOTTIME),
            "pid": os.getpid(),
        }

    def observe(self, console: Callable[[bytes], None], woken: Callable[[], None]) -> None:
        """See ``Target``."""
        self._machine.output.add_observer(console)
        self._woken = woken
        # Before the terminal's: of two who set input_waits, the last one knows both.
        self._attach(True)

    def begin_pause(self) -> None:
        """See ``Target``."""
        self._runner.begin_pause()

    def resume(self) -> None:
        """See ``Target``."""
        self._runner.resume()

    @property
    def clone_id(self) -> UUID | None:
        """See ``Target``."""
        return self._machine.clone_id

    @property
    def is_paused(self) -> bool:
        """See ``Target``."""
        return self._runner.is_paused

    @property
    def is_at_rest(self) -> bool:
        """See ``Target``."""
        return self._runner.has_resting_vcpus

    def finish(self, outcome: Outcome) -> None:
        """See ``Target``."""
        self._runner.finish(outcome)

    def refresh_disks(self) -> None:
        """See ``Target``."""
        self._machine.board.refresh()

    def type(self, data: bytes) -> bool:
        """See ``Target``."""
        with self._lock:
            if len(self._typed) + len(data) > MAX_TYPED_BYTES:
                return False
            self._typed += data
        self._runner.wake()
        return True

    def registers(self, vcpu: int) -> Registers:
        """See ``Target``."""
        return self._vcpus[vcpu].registers

    def memory(self, gpa: int, length: int) -> bytes:
        """See ``Target``."""
        return self._machine.board.memory.read(gpa, length)

    def evidence(self) -> dict[str, object]:
        """See ``Target``."""
        seen, exits = self._machine.evidence, self._machine.exits
        return {
            **vars(seen), "has_panicked": seen.has_panicked,
            "panic_reason": seen.panic_reason if seen.has_panicked else "",
            "exits": {"mmio": exits.mmio, "io": exits.io, "other": exits.other},
        }

    def _attach(self, begins_anew: bool) -> None:
        """Look at each wake-up of a run that begins; no typed byte is for the guest before it."""
        with self._lock:
            self._typed.clear()
        if not begins_anew:
            return

        def look() -> None:
            self._hand_over()
            self._woken()

        self._runner.on_wake(look)

    def _hand_over(self) -> None:
        """Offer typed bytes to the guest, in the thread that keeps house."""
        if not self._typed or self._runner.is_quiesced:
            return
        # Set before asking: room that comes after the answer makes another wake-up.
        self._runner.input_waits = True
        while True:
            with self._lock:
                waiting = bytes(self._typed[:4096])
            taken = self._machine.consoles.receive(waiting) if waiting else 0
            with self._lock:
                del self._typed[:taken]
            if not taken:
                break
        self._runner.input_waits = bool(self._typed)

