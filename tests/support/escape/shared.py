"""Results in memory that the program shares with those that it forks: no descriptor is needed."""

from __future__ import annotations

import mmap
import struct

UNTRIED, BEGUN, RETURNED, FAILED, SIGNALLED, EXITED, HUNG = range(7)
_SLOT = struct.Struct("=ii")
SIGSYS = 31


class Results:
    """``rows`` times ``columns`` results, each a state and a number."""

    def __init__(self, rows: int, columns: int) -> None:
        self._columns = columns
        self._memory = mmap.mmap(-1, rows * columns * _SLOT.size)

    def set(self, row: int, column: int, state: int, number: int = 0) -> None:
        """Note a result, as an errno (FAILED) or a signal."""
        at = (row * self._columns + column) * _SLOT.size
        _SLOT.pack_into(self._memory, at, state, number)

    def state(self, row: int, column: int) -> int:
        """Return the state of one attempt."""
        state: int = _SLOT.unpack_from(self._memory, self._at(row, column))[0]
        return state

    def text(self, row: int, column: int) -> str:
        """Return the result in words; "" if nothing was tried."""
        state, number = _SLOT.unpack_from(self._memory, self._at(row, column))
        if state == SIGNALLED:
            return "killed" if number == SIGSYS else f"signal {number}"
        return {
            UNTRIED: "", BEGUN: "lost", RETURNED: "ok", FAILED: f"errno {number}",
            EXITED: f"exit {number}", HUNG: "hung",
        }[state]

    def _at(self, row: int, column: int) -> int:
        return (row * self._columns + column) * _SLOT.size
