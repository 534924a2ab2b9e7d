"""Patterns that the console must show, in any order."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence

from pyvmm.console.output import LineWatch
from pyvmm.startup.types import Record


class Expected(Record):
    """A pattern, and the line in which it was seen first: None if it was not.  ``at_s`` is the time
    then, in seconds from the start."""

    pattern: str
    line: str | None = None
    at_s: float = 0.0


class Expectations:
    """Looks for each of ``patterns`` in every line; each must come once, in any order.

    A line without an end counts, because a prompt has none.  ``on_met`` is called once, when the
    last one came.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        clock: Callable[[], float],
        on_met: Callable[[], None] | None = None,
    ) -> None:
        self._waiting = {number: re.compile(text) for number, text in enumerate(patterns)}
        self._found = {number: Expected(pattern=text) for number, text in enumerate(patterns)}
        self._clock = clock
        self._on_met = on_met
        self._lines = LineWatch(self._look)
        self.are_met = threading.Event()
        """Set once all came."""
        if not self._waiting:
            self.are_met.set()

    @property
    def found(self) -> tuple[Expected, ...]:
        """Return all expectations, in their order."""
        return tuple(self._found.values())

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the patterns that have not come."""
        return tuple(one.pattern for one in self._found.values() if one.line is None)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the console.  One thread alone may call this."""
        if self._waiting:
            self._lines.feed(data)
            if self._lines.unfinished:
                self._look(self._lines.unfinished)

    def _look(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        for number, pattern in list(self._waiting.items()):
            if pattern.search(text):
                del self._waiting[number]
                self._found[number] = self._found[number].replace(line=text, at_s=self._clock())
        if not self._waiting and not self.are_met.is_set():
            self.are_met.set()
            if self._on_met is not None:
                self._on_met()
