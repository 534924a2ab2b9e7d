"""Snapshots, checkpoints and rewinds of the machine of a control server."""

from __future__ import annotations

from pyvmm.startup.types import Protocol, Record


class Saved(Record):
    """A snapshot that was taken."""

    id: str
    """Its UUID."""
    path: str | None
    """Its directory, None if it is in memory."""


class Rewound(Record):
    """A machine after its rewind."""

    had_ended: bool
    """True if its run was over: its owner must run it again."""
    unfinished: bytes = b""
    """The beginning of a line that its console had printed."""


class Saves(Protocol):
    """The states that a machine has saved.

    ``snapshot``, ``checkpoint`` and ``rewind`` wait for the guest and for disks, so the control
    server calls them in a thread of their own, one at a time.  SnapshotError says why something
    cannot be saved or gone back to.
    """

    @property
    def can_rewind(self) -> bool:
        """True if there is something to go back to."""

    def facts(self) -> dict[str, object]:
        """Return the fields of ``status``: JSON values.  It waits for nothing."""

    def snapshot(self, directory: str | None, *, is_live: bool, is_diff: bool) -> Saved:
        """Save the machine into a new directory, or in memory; a guest that ran goes on."""

    def checkpoint(self) -> int:
        """Take a checkpoint in memory, and return its number."""

    def rewind(self, number: int | None) -> Rewound:
        """Go back to a checkpoint; None is the newest checkpoint or snapshot there is."""
