"""The snapshots and checkpoints of ``pyvmm run``'s own machine: see ``Saves``."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.control.saves import Rewound, Saved
from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine


class MachineSaves:
    """``Saves`` of ``machine``.

    ``attach`` is called before a guest that was rewound goes on, with True if its run begins anew.
    A start loads none of the modules that save a machine.
    """

    def __init__(self, machine: Machine, attach: Callable[[bool], None]) -> None:
        self._machine = machine
        self._attach = attach

    @property
    def can_rewind(self) -> bool:
        """See ``Saves``."""
        return self._machine.newest is not None or bool(self._numbers())

    def facts(self) -> dict[str, object]:
        """See ``Saves``."""
        newest = self._machine.newest
        known = None
        if newest is not None:
            from pyvmm.snapshot.snapshot import Snapshot

            assert isinstance(newest, Snapshot)  # it is nothing else
            known = {"id": str(newest.id), "path": newest.path}
        return {
            "snapshot": known,
            "checkpoints": list(self._numbers()),
        }

    def snapshot(self, directory: str | None, *, is_live: bool, is_diff: bool) -> Saved:
        """See ``Saves``."""
        from pyvmm.snapshot.capture import take

        if directory is None and (is_live or is_diff):
            raise SnapshotError("snapshot()", "live and diff are for a directory")
        with take(self._machine, directory, live=is_live, diff=is_diff) as taken:
            return Saved(id=str(taken.id), path=taken.path)

    def checkpoint(self) -> int:
        """See ``Saves``."""
        from pyvmm.snapshot.checkpoints import checkpoints_of

        return checkpoints_of(self._machine).take()

    def rewind(self, number: int | None) -> Rewound:
        """See ``Saves``."""
        from pyvmm.snapshot.checkpoints import checkpoints_of

        had_ended = False

        def attach(begins_anew: bool) -> None:
            nonlocal had_ended
            had_ended = begins_anew
            self._attach(begins_anew)

        checkpoints_of(self._machine).rewind(number, attach=attach)
        return Rewound(had_ended=had_ended, unfinished=self._machine.watch.unfinished)

    def _numbers(self) -> tuple[int, ...]:
        if self._machine.checkpoints is None:
            return ()
        from pyvmm.snapshot.checkpoints import checkpoints_of

        return checkpoints_of(self._machine).numbers
