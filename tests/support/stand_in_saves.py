"""Snapshots and checkpoints of a machine that is none, which a test can hold up and have fail."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

from pyvmm.control.client import ControlError
from pyvmm.control.saves import Rewound, Saved
from pyvmm.errors import SnapshotError
from tests.support.patience import patient
from tests.support.stand_in_target import Served, StandInTarget


class StandInSaves:
    """``Saves`` of a ``StandInTarget``: numbers instead of states."""

    def __init__(self, target: StandInTarget) -> None:
        self.target = target
        self.done: list[str] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.has_begun = threading.Event()
        self.error: Exception | None = None
        self.on_rewind: Callable[[], None] = lambda: None
        """The guest's and the port's part of a rewind."""
        self.threads: set[str] = set()
        self._numbers: list[int] = []
        self._snapshot: Saved | None = None
        self._running = threading.Lock()

    @property
    def can_rewind(self) -> bool:
        return bool(self._numbers) or self._snapshot is not None

    def facts(self) -> dict[str, object]:
        taken = self._snapshot
        return {
            "snapshot": None if taken is None else {"id": taken.id, "path": taken.path},
            "checkpoints": list(self._numbers),
        }

    def snapshot(self, directory: str | None, *, is_live: bool, is_diff: bool) -> Saved:
        flags = f"{' live' if is_live else ''}{' diff' if is_diff else ''}"
        self._work(f"snapshot {directory}{flags}")
        self._snapshot = Saved(id=str(uuid.uuid4()), path=directory)
        return self._snapshot

    def checkpoint(self) -> int:
        self._work("checkpoint")
        self._numbers.append(len(self._numbers) + 1)
        return self._numbers[-1]

    def rewind(self, number: int | None) -> Rewound:
        self._work(f"rewind {number}")
        if not self.can_rewind or (number is not None and number not in self._numbers):
            raise SnapshotError("rewind()", "there is nothing to go back to")
        had_ended = self.target.outcome is not None
        self.target.outcome = None
        self.target.finished.clear()
        if had_ended:
            self.target.is_paused = True
        self.target.clone_id = uuid.uuid4()
        self.on_rewind()
        return Rewound(had_ended=had_ended)

    def _work(self, name: str) -> None:
        assert self._running.acquire(blocking=False), "two at a time"
        try:
            self.threads.add(threading.current_thread().name)
            self.has_begun.set()
            assert self.may_go.wait(patient(30))
            if self.error is not None:
                raise self.error
            self.done.append(name)
        finally:
            self._running.release()


def saves_of(rig: Served) -> StandInSaves:
    """The stand-in that ``rig`` has."""
    assert isinstance(rig.target.saves, StandInSaves)
    return rig.target.saves


def problem_of(pending: Any) -> ControlError:
    """The error that answers a request."""
    error = pending.exception(patient(10))
    assert isinstance(error, ControlError)
    return error
