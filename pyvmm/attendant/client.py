"""Whoever does for a machine what a jailed process may not: the interface, and the easy half.

Two classes have the interface.  ``LocalAttendant`` does everything in the machine's own process,
for ``--jail off``.  ``attendant.remote`` has the machine's half of a process beside it, for a
machine in a jail.

An attendant is made before the guest runs.  Any thread may ask it.
"""

from __future__ import annotations

import contextlib

from pyvmm.attendant.duties import Duties
from pyvmm.report import say
from pyvmm.startup.types import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from os import PathLike

    from pyvmm.run.outcome import Outcome
    from pyvmm.run.verdict import Evidence
    from pyvmm.snapshot.files.making import SnapshotWriter


class Attendant(Protocol):
    """Does what ``Duties`` allow.  An OSError or SnapshotError leaves it usable."""

    def scratch_file(self) -> int:
        """Return a descriptor, for reading and writing, of a new file without a name; OSError.

        It lies in ``storage.scratch.snapshot_directory()``, and the caller closes it.
        """

    def snapshot_writer(self, path: str | PathLike[str]) -> SnapshotWriter:
        """Return the writer of a new snapshot's directory; SnapshotError."""

    def ended(self, outcome: Outcome, evidence: Evidence) -> None:
        """Print the explanation of a run that has ended, if there is one; this may take seconds."""

    def jailed(self) -> None:
        """Note that this process can open nothing any more."""

    def wake(self) -> None:
        """Make the next request quick, and do not wait for that; idempotent."""

    def descriptors(self) -> dict[int, str]:
        """Return the descriptors that a jailed process must keep open for it, each with a name."""

    def close(self) -> None:
        """Do what comes last, and return once it is done; idempotent."""


class LocalAttendant:
    """The attendant of a process that may do everything itself; see ``Attendant``."""

    def __init__(self, duties: Duties) -> None:
        self._duties = duties
        self._is_closed = False
        if duties.hands_out_files:  # imported now, because nothing is while a guest runs
            from pyvmm.snapshot.files.writer import Writer
            from pyvmm.storage.scratch import nameless_file

            self._make_writer, self._nameless_file = Writer, nameless_file

    def scratch_file(self) -> int:
        """See ``Attendant``."""
        return self._nameless_file()

    def snapshot_writer(self, path: str | PathLike[str]) -> SnapshotWriter:
        """See ``Attendant``."""
        return self._make_writer(path)

    def ended(self, outcome: Outcome, evidence: Evidence) -> None:
        """See ``Attendant``."""
        # The outcome stands, even if no descriptor is left to read a remedy with.
        with contextlib.suppress(OSError, ImportError):
            for line in self._duties.explain(outcome, evidence):
                say(line)

    def jailed(self) -> None:
        """See ``Attendant``: it never is."""

    def wake(self) -> None:
        """See ``Attendant``: nothing is slow here."""

    def descriptors(self) -> dict[int, str]:
        """See ``Attendant``."""
        return {}

    def close(self) -> None:
        """See ``Attendant``."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._duties.socket_name is not None:
            self._duties.socket_name.remove()
        self._duties.tidy()
