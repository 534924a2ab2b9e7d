"""The output half of a run's console, plugged into the loop that keeps house."""

from __future__ import annotations

from pyvmm.console.output import OutputPump
from pyvmm.run.io_loop import Deadline, IoLoop, IoSource


class PluggedOutput:
    """Has ``loop`` show the bytes in ``pump``, once they are due and the host has room.

    Call ``look`` in the loop's thread whenever there may be more to show.
    """

    def __init__(self, pump: OutputPump, loop: IoLoop) -> None:
        self._pump = pump
        self._loop = loop
        self._source: IoSource | None = None
        """Waits for room; None if there is nothing to write yet."""
        self._next_look: Deadline | None = None
        self._next_look_s: float | None = None

    def look(self) -> None:
        """Have the loop wait for room to write, or for the time at which bytes are due."""
        fd = self._pump.fd_to_write()
        if self._source is not None and self._source.fd != fd:
            self._loop.remove(self._source)
            self._source = None
        if fd is not None and self._source is None:
            self._source = IoSource(fd, self._write, edge_triggered=False, is_output=True)
            self._loop.add(self._source)
        # Bytes that are being shown wait for the host, not for the clock.
        self._look_at(self._pump.due_s if fd is None else None)

    def _write(self) -> None:
        self._pump.write()
        self.look()

    def _look_at(self, at_s: float | None) -> None:
        if at_s == self._next_look_s:
            return
        if self._next_look is not None:
            self._next_look.cancel()
        self._next_look_s = at_s
        self._next_look = None if at_s is None else self._loop.call_at(at_s, self._look_again)

    def _look_again(self) -> None:
        self._next_look_s = self._next_look = None
        self.look()
