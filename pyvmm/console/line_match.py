"""Waits for a line of the guest's console that a regular expression matches."""

from __future__ import annotations

import re
from collections.abc import Callable

from pyvmm.console.output import LineWatch
from pyvmm.errors import ConfigError

_CONTROLS = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
"""Control sequences of a terminal, without those that have a text: colours, ash's ``ESC[6n``."""


def line_pattern(option: str, text: str) -> re.Pattern[bytes]:
    """Return ``text`` compiled for lines of a console; ConfigError names ``option``."""
    if not text:
        raise ConfigError(f"{option} ''", "matches every line; write a regular expression")
    try:
        return re.compile(text.encode("utf-8", "surrogateescape"))
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{option} {text!r}", f"is no regular expression: {error}") from None


class LineMatch:
    """Calls ``on_match`` once, for the first line in which ``pattern`` is found.

    A line counts before its end has come, so that a prompt is found: ``$`` matches at the end of
    the bytes so far.  Colours and other control sequences are left out.  The first LineWatch.LIMIT
    bytes of a line are searched.  ``feed`` belongs to one thread.
    """

    def __init__(self, pattern: re.Pattern[bytes], on_match: Callable[[], None]) -> None:
        self._pattern = pattern
        self._on_match = on_match
        self._lines = LineWatch(self._search)
        self._is_found = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the console."""
        if self._is_found:
            return
        self._lines.feed(data)
        if self._lines.unfinished:
            self._search(self._lines.unfinished)

    def _search(self, line: bytes) -> None:
        if not self._is_found and self._pattern.search(_CONTROLS.sub(b"", line)):
            self._is_found = True
            self._on_match()
