"""Results in memory that the program shares with those that it forks: no descriptor is needed."""

from __future__ import annotations

import mmap
import struct

UNTRIED, BEGUN, RETURNED, FAILED, SIGNALLED, EXITED, HUNG = range(7)
_RESULT, _ACTION = struct.Struct("=ii"), struct.Struct("=I")
_SLOT_BYTES = _RESULT.size + _ACTION.size
SIGSYS = 31


class Results:
    """``rows`` times ``columns`` results: each a state, a number, and what the table has."""

    def __init__(self, rows: int, columns: int) -> None:
        self._columns = columns
        self._memory = mmap.mmap(-1, rows * columns * _SLOT_BYTES)

    def set(self, row: int, column: int, state: int, number: int = 0) -> None:
        """Note a result, as an errno (FAILED) or a signal."""
        _RESULT.pack_into(self._memory, self._at(row, column), state, number)

    def expect(self, row: int, column: int, action: int) -> None:
        """Note the action that the table has."""
        _ACTION.pack_into(self._memory, self._at(row, column) + _RESULT.size, action)

    def expected(self, row: int, column: int) -> int:
        """Return the action that the table has."""
        action: int = _ACTION.unpack_from(
            self._memory, self._at(row, column) + _RESULT.size
        )[0]
        return action

    def state(self, row: int, column: int) -> int:
        """Return the state of one attempt."""
        state: int = _RESULT.unpack_from(self._memory, self._at(row, column))[0]
        return state

    def text(self, row: int, column: int) -> str:
        """Return the result in words; "" if nothing was tried."""
        state, number = _RESULT.unpack_from(self._memory, self._at(row, column))
        if state == SIGNALLED:
            return "killed" if number == SIGSYS else f"signal {number}"
        return {
            UNTRIED: "", BEGUN: "lost", RETURNED: "ok", FAILED: f"errno {number}",
            EXITED: f"exit {number}", HUNG: "hung",
        }[state]

    def _at(self, row: int, column: int) -> int:
        return (row * self._columns + column) * _SLOT_BYTES
