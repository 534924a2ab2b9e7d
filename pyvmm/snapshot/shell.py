"""A machine that was made of a snapshot ahead of time, and only needs its state."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.errors import SnapshotError, StateError
from pyvmm.machine import Machine
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.snapshot.snapshot import Snapshot

CLOCKS = ("keep", "now")
"""A clone's kvm-clock goes on from the save, or shows that time has passed since."""


class Lines:
    """Takes a machine's lines to a person, and hands them to whoever has the machine: ``to``."""

    def __init__(self, to: Callable[[str], None]) -> None:
        self.to = to

    def __call__(self, line: str) -> None:
        """Hand over ``line``."""
        self.to(line)


class Shell:
    """``machine``, built from ``snapshot``: a VM, memory, disks and devices, but no state.

    Either it becomes a clone or it is closed; once.  ``lines`` may be led elsewhere.
    """

    def __init__(self, machine: Machine, snapshot: Snapshot, lines: Lines) -> None:
        self.machine = machine
        self.lines = lines
        self._snapshot = snapshot

    def become_clone(self, *, timeout_s: float | None = None, clock: str = "keep") -> Machine:
        """Give the machine its state and a new ``clone_id``; return it, ready to start.

        The run ends after ``timeout_s`` seconds.  ``clock`` is among CLOCKS.  SnapshotError if the
        snapshot's state cannot be used, ConfigError for such a time; the machine is closed then.
        """
        machine = self.machine
        try:
            machine.timeout_s = machine.config.replace(timeout_s=timeout_s).timeout_s
            give_state(machine, self._snapshot, clock)
        except BaseException:
            machine.close()
            raise
        return machine

    def close(self) -> None:
        """Free all that the shell has."""
        self.machine.close()


def give_state(machine: Machine, snapshot: Snapshot, clock: str = "keep") -> None:
    """Give ``machine``, whose RAM is the snapshot's, the rest of it and a new ``clone_id``.

    SnapshotError.
    """
    if clock not in CLOCKS:
        raise SnapshotError(f"clock {clock!r}", f"is none of {', '.join(CLOCKS)}")
    try:
        machine.restore(snapshot.facts.state, clock=clock)
    except StateError as error:
        raise SnapshotError(snapshot.name, f"its state cannot be used: {error}") from error
    machine.renew_clone_id()
