"""Lines about a peer that does the same again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

REPEAT_S = 60.0


class RepeatFilter:
    """Callable that passes a line to ``report`` unless the same line went there under REPEAT_S ago.

    For complaints about a peer that repeats itself, such as a VMM that keeps reconnecting.
    """

    _MOST = 100  # lines whose time is kept

    def __init__(
        self, report: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report = report
        self._clock = clock
        self._said_s: dict[str, float] = {}

    def __call__(self, line: str) -> None:
        """Pass ``line`` to ``report``, unless it is a repetition."""
        now_s = self._clock()
        said_s = self._said_s.get(line)
        if said_s is None or now_s - said_s >= REPEAT_S:
            self._report(line)
            self._said_s.pop(line, None)
            if len(self._said_s) >= self._MOST:
                del self._said_s[next(iter(self._said_s))]
            self._said_s[line] = now_s
