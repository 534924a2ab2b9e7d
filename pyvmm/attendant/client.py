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
    from collections.abc import Mapping
    from typing import Self

    from pyvmm.errors import SnapshotError
    from pyvmm.run.outcome import Outcome
    from pyvmm.run.verdict import Evidence


class SnapshotWriter(Protocol):
    """A snapshot's directory in the making; see ``snapshot.files.writer.Writer``.

    A context manager, which aborts unless ``finish`` was called.  One thread uses it.
    """

    @property
    def path(self) -> str:
        """The directory that there will be, as an absolute path."""

    @property
    def held_bytes(self) -> int:
        """The bytes that the files take on their disk, once ``finish`` has returned."""

    def create(self, name: str) -> int:
        """Return a descriptor, for reading and writing, of a new file in the directory.

        The caller closes it.  ``name`` is one that a snapshot has.  SnapshotError.
        """

    def reopen(self, name: str) -> int:
        """Return a descriptor, for reading, of a file of the directory, finished or not.

        The caller closes it.  SnapshotError.
        """

    def size_of(self, name: str) -> int:
        """Return the size in bytes of the file ``name``, which is there.  SnapshotError."""

    def failed(self, error: OSError, name: str = "ram") -> SnapshotError:
        """Return the exception to raise after ``error`` at the file ``name``."""

    def finish(self, state: Mapping[str, object]) -> None:
        """Write ``state``, make everything stable, and give the directory its name.

        SnapshotError: nothing is left then.
        """

    def abort(self) -> None:
        """Remove everything that was made; idempotent, and nothing after ``finish``."""

    def __enter__(self) -> Self:
        """Return this."""

    def __exit__(self, *_exc: object) -> None:
        """Abort, unless ``finish`` was called."""


class Attendant(Protocol):
    """Does what ``Duties`` allow.  An OSError or SnapshotError leaves it usable."""

    def scratch_file(self) -> int:
        """Return a descriptor, for reading and writing, of a new file without a name; OSError.

        It lies in ``storage.scratch.snapshot_directory()``, and the caller closes it.
        """

    def snapshot_writer(self, path: str) -> SnapshotWriter:
        """Return the writer of a new snapshot's directory; SnapshotError."""

    def ended(self, outcome: Outcome, evidence: Evidence) -> None:
        """Print the explanation of a run that has ended, if there is one; this may take seconds."""

    def close(self) -> None:
        """Do what comes last, and return once it is done; idempotent."""


class LocalAttendant:
    """The attendant of a process that may do everything itself; see ``Attendant``."""

    def __init__(self, duties: Duties) -> None:
        self._duties = duties
        self._is_closed = False
        if duties.hands_out_files:  # imported now, because nothing is while a guest runs
            from pyvmm.snapshot.files.writer import Writer
            from pyvmm.storage.scratch import open_nameless, snapshot_directory

            self._make_writer = Writer
            self._open_nameless, self._scratch_directory = open_nameless, snapshot_directory()

    def scratch_file(self) -> int:
        """See ``Attendant``."""
        return self._open_nameless(self._scratch_directory)

    def snapshot_writer(self, path: str) -> SnapshotWriter:
        """See ``Attendant``."""
        return self._make_writer(path)

    def ended(self, outcome: Outcome, evidence: Evidence) -> None:
        """See ``Attendant``."""
        # The outcome stands, even if no descriptor is left to read a remedy with.
        with contextlib.suppress(OSError, ImportError):
            for line in self._duties.explain(outcome, evidence):
                say(line)

    def close(self) -> None:
        """See ``Attendant``."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._duties.socket_name is not None:
            self._duties.socket_name.remove()
        self._duties.tidy()
