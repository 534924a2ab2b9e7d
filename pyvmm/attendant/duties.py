"""All that one run may ask of its attendant; made before the guest runs, and never changed.

The process that asks may have been taken over by its guest.  So an attendant does only what the
options of the start call for, and each of these things as often as that start can need it.
"""

from __future__ import annotations

from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyvmm.run.outcome import Outcome
    from pyvmm.run.verdict import Evidence
    from pyvmm.vhost_user.socket_name import SocketName


class Duties(Record):
    """All that an attendant may be asked for.

    ``explain`` returns lines for a person about a run that has ended.  It may take seconds and
    raise OSError or ImportError: then there is nothing to say.  ``tidy`` is called last, and raises
    nothing.  ``socket_name`` is removed at the end, however the machine ends.

    Snapshots go to ``snapshot_path`` (of ``--snapshot``; None: to none) or, with ``any_snapshot``
    (of ``--control``), wherever a client names a directory that does not exist.
    ``most_scratch_files`` is the number of nameless files that a whole run may ask for.
    """

    explain: Callable[[Outcome, Evidence], Iterable[str]]
    tidy: Callable[[], None]
    socket_name: SocketName | None = None
    snapshot_path: str | None = None
    any_snapshot: bool = False
    most_scratch_files: int = 0

    @property
    def hands_out_files(self) -> bool:
        """True if the run may ask for files: a nameless one, or those of a snapshot."""
        return bool(
            self.any_snapshot or self.snapshot_path is not None or self.most_scratch_files
        )
