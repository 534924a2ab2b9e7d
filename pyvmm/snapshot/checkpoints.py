"""Moments of one machine, kept in memory, to which it can return (docs/time-travel.md)."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from pyvmm.board.disks import check_disks, check_way_back, freeze_disks, revert_disks
from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine
from pyvmm.ram.journal import RamJournal
from pyvmm.ram.pages import drop_own
from pyvmm.snapshot.rewind import WayBack, put_back
from pyvmm.snapshot.snapshot import Snapshot
from pyvmm.snapshot.still import check_open, one_moment, state_of, still
from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from pyvmm.storage.frozen import FrozenDisk

MAX_BYTES = 1 << 30
"""RAM that is kept to undo what a guest has written between checkpoints, unless told otherwise."""
MAX_COUNT = 1024
"""Checkpoints that are kept at most: for each there are some 50 kB of state, besides RAM."""
CALL, BACK = "checkpoint()", "rewind()"


class Checkpoint(Record, kw_only=False):
    """A moment: all but RAM, which the journal has by ``number``.

    ``newest`` is the snapshot that was the machine's newest then.
    """

    number: int
    state: dict[str, object]
    disks: Sequence[FrozenDisk]
    newest: object

    def close(self) -> None:
        """Free the disks."""
        for disk in self.disks:
            disk.close()


class Checkpoints:
    """The checkpoints of ``machine``, and its way back to them or to its newest snapshot.

    Only the pages that were written since the last checkpoint are copied.  Those that undo them
    take ``max_bytes`` at most, and there are ``max_count`` checkpoints at most: the oldest one goes
    first, and ``dropped`` counts them.  All methods may be called from any thread that is none of
    the run; the machine's lock is held meanwhile.
    """

    def __init__(
        self, machine: Machine, *, max_bytes: int = MAX_BYTES, max_count: int = MAX_COUNT
    ) -> None:
        self._machine = machine
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._journal: RamJournal | None = None
        self._kept: deque[Checkpoint] = deque()
        self._newest_before: object = None
        """The machine's snapshot when it took its newest checkpoint, or went back to one."""
        self.dropped = 0
        """The number of checkpoints that went to make room."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The checkpoints that there are, the oldest first; a number is never given twice."""
        return tuple(kept.number for kept in list(self._kept))

    @property
    def held_bytes(self) -> int:
        """The RAM that the checkpoints take to be undone."""
        return 0 if self._journal is None else self._journal.held_bytes

    def take(self) -> int:
        """Keep this moment; return its number.

        SnapshotError for disks that cannot be brought back, before the guest is held; and for a
        machine that is over, or has a part without a state.
        """
        machine = self._machine
        check_disks(machine.board, into_directory=False, to_rewind=True)
        if machine.board.memory.fd is not None:
            raise SnapshotError(CALL, "another process shares the guest's RAM, and may write it")
        with (
            one_moment(machine, CALL), machine.lock, still(machine, CALL),
            contextlib.ExitStack() as undo,
        ):
            disks = freeze_disks(machine.board)
            for disk in disks:
                undo.callback(disk.close)
            state = state_of(machine, CALL)
            if self._journal is None:
                self._journal = RamJournal(machine.board.memory, max_bytes=self._max_bytes)
            try:
                number = self._journal.checkpoint()
            finally:
                self._drop(self._journal.numbers)
            undo.pop_all()
            self._newest_before = machine.newest
            self._kept.append(Checkpoint(number, state, disks, machine.newest))
            while len(self._kept) > self._max_count:
                self._kept.popleft().close()
                self.dropped += 1
        return number

    def rewind(
        self,
        number: int | None = None,
        *,
        attach: Callable[[bool], None] = lambda _begins_anew: None,
    ) -> None:
        """Take the machine back to checkpoint ``number``; those after it are forgotten.

        None is the newest moment: a checkpoint, or the snapshot that was taken after it, or the one
        from which the machine was cloned.  SnapshotError, before the guest is held: there is none,
        or no such checkpoint, or a disk cannot be brought back.
        See ``snapshot.rewind`` for ``attach`` and all else.
        """
        machine = self._machine
        with one_moment(machine, BACK), machine.lock:
            kept = self._find(number)
            check_way_back(machine.board, self._disks_of(kept))
            if kept is None:
                self._go_back_to_newest(attach)
            else:
                self._go_back(kept, attach)

    def close(self) -> None:
        """Forget all checkpoints, before the machine is closed; idempotent."""
        with self._machine.lock:
            while self._kept:
                self._kept.pop().close()
            if self._journal is not None:
                self._journal.close()
                self._journal = None

    def _find(self, number: int | None) -> Checkpoint | None:
        """Return the checkpoint to go back to; None for the machine's snapshot; SnapshotError."""
        newest = self._machine.newest
        if number is None:
            if self._kept and (newest is None or newest is self._newest_before):
                return self._kept[-1]
            if newest is None:
                raise SnapshotError(
                    BACK, "there is no checkpoint and no snapshot to go back to"
                )
            return None
        for kept in self._kept:
            if kept.number == number:
                return kept
        held = f"{self._kept[0].number} to {self._kept[-1].number}" if self._kept else "none"
        raise SnapshotError(f"checkpoint {number}", f"is not held; there are {held}")

    def _disks_of(self, kept: Checkpoint | None) -> Sequence[FrozenDisk]:
        """Return the disks of ``kept``, or of the machine's snapshot if that is None."""
        if kept is not None:
            return kept.disks
        assert isinstance(self._machine.newest, Snapshot)  # it is nothing else
        return self._machine.newest.disks

    def _go_back(self, kept: Checkpoint, attach: Callable[[bool], None]) -> None:
        machine, journal = self._machine, self._journal
        assert journal is not None  # there are checkpoints

        def bring_back() -> None:
            journal.rewind(kept.number)
            revert_disks(machine.board, kept.disks)

        try:
            put_back(machine, WayBack(state=kept.state, bring_back=bring_back, attach=attach))
        finally:
            while self._kept and self._kept[-1].number not in journal.numbers:
                self._kept.pop().close()
        self._newest_before = machine.newest

    def _go_back_to_newest(self, attach: Callable[[bool], None]) -> None:
        machine, snapshot = self._machine, self._machine.newest
        assert isinstance(snapshot, Snapshot)  # it is nothing else
        memory = machine.board.memory

        def bring_back() -> None:
            if memory.image is not None and memory.image.layers == snapshot.image.layers:
                drop_own(memory)
            else:
                memory.map_image(snapshot.image)
                old, machine.base = machine.base, snapshot.share()
                if old is not None:
                    old.close()
            revert_disks(machine.board, snapshot.disks)

        way = WayBack(state=snapshot.facts.state, bring_back=bring_back, attach=attach)
        put_back(machine, way)
        while self._kept and self._kept[-1].newest is snapshot:
            self._kept.pop().close()
        self._newest_before = None

    def _drop(self, numbers: tuple[int, ...]) -> None:
        """Forget the checkpoints whose RAM the journal has forgotten to make room."""
        while self._kept and self._kept[0].number not in numbers:
            self._kept.popleft().close()
            self.dropped += 1


def checkpoints_of(machine: Machine) -> Checkpoints:
    """Return the checkpoints of ``machine``, which closes them."""
    with machine.lock:
        check_open(machine, CALL)
        found = machine.checkpoints
        if not isinstance(found, Checkpoints):
            found = machine.checkpoints = Checkpoints(machine)
        return found
