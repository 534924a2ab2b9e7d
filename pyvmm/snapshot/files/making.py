"""A snapshot's directory in the making, as those see it who write a snapshot into it.

``files.writer.Writer`` makes one in this process.  For a jailed machine, which may open no file,
its attendant does (``attendant/``).
"""

from __future__ import annotations

from pyvmm.startup.types import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from pyvmm.errors import SnapshotError

    MakeWriter = Callable[[str], "SnapshotWriter"]
    """Returns the writer of a new directory; SnapshotError."""


class SnapshotWriter(Protocol):
    """A snapshot's directory in the making; see ``files.writer.Writer``.

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
