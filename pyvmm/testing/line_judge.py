"""Reads the console's lines for the first one that fails a test.

The judge knows lines, not machines: ``watched.py`` binds it to one.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable

from pyvmm.console.output import LineWatch
from pyvmm.console.watch import texts
from pyvmm.report import escape
from pyvmm.startup.types import Record
from pyvmm.testing.fail_on import ERRORS, FAIL_ON, Classifier, FailOn
from pyvmm.testing.verdicts import BootError, FailedOn

LINES_BEFORE = 40
MAX_TRACE_LINES = 200
TRACE_S = 1.0
"""Seconds that a call trace may take; whoever binds a judge calls ``end`` after them."""

_TRACE_ENDS = ("---[ end trace ", "---[ end Kernel panic")
_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][0-9A-Za-z]|\x0f")
"""A terminal's colours, which systemd and dmesg print: left out of what is shown elsewhere."""


class Finding(Record):
    """The first bad line: its class ("fail-on" for a user's pattern), the lines around it.

    All lines are escaped.
    """

    kind: str
    line: str
    pattern: str = ""
    before: tuple[str, ...] = ()
    trace: tuple[str, ...] = ()

    def error(self) -> BootError:
        """Return the exception for it."""
        kind = ERRORS.get(self.kind, FailedOn)
        return kind(self.line, line=self.line, before=self.before, trace=self.trace)


class LineJudge:
    """Calls ``on_verdict`` once, with the first bad line and the call trace behind it.

    ``on_suspect`` is called when that line came; its call trace is awaited then.  It is complete at
    its own end mark, after MAX_TRACE_LINES, or when ``end`` is called: by a timer, TRACE_S later,
    or because the run is over.  Methods may be called from any thread; the callbacks are called in
    the caller's.
    """

    def __init__(
        self,
        on_verdict: Callable[[Finding], None],
        *,
        fail_on: FailOn = FAIL_ON,
        on_suspect: Callable[[], None] | None = None,
    ) -> None:
        self._on_verdict = on_verdict
        self._on_suspect = on_suspect
        self._classifier = Classifier(fail_on)
        self._lock = threading.Lock()
        self._lines = LineWatch(self.line)
        self._before: deque[str] = deque(maxlen=LINES_BEFORE)
        self._has_stamps = False
        self._is_booting = True
        self._suspect: Finding | None = None
        self._trace: list[str] = []
        self._is_done = False

    @property
    def last_lines(self) -> tuple[str, ...]:
        """Return the last LINES_BEFORE lines before the bad one, escaped."""
        with self._lock:
            return tuple(self._before)

    def boot_is_over(self) -> None:
        """Take no line for an initramfs's any more: user space may print what it likes."""
        self._is_booting = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the console.  One thread alone may call this."""
        self._lines.feed(data)

    def line(self, line: str | bytes) -> None:
        """Take a line of the console, without its end."""
        data = line if isinstance(line, bytes) else line.encode("utf-8", "surrogateescape")
        with self._lock:
            is_suspect, finding = self._take(data)
        if is_suspect and self._on_suspect is not None:
            self._on_suspect()
        if finding is not None:
            self._on_verdict(finding)

    def end(self) -> None:
        """Await no more of a call trace: the verdict is given now, if a bad line was seen."""
        with self._lock:
            finding = self._finished()
        if finding is not None:
            self._on_verdict(finding)

    def _take(self, data: bytes) -> tuple[bool, Finding | None]:
        """Return True if ``data`` is the first bad line, and the finding if it is complete."""
        shown = shown_line(data)
        if self._is_done:
            return False, None
        *stamped, whole = texts(data)
        self._has_stamps = self._has_stamps or bool(stamped)
        messages = [
            one.decode("utf-8", "backslashreplace")
            for one in (stamped if self._has_stamps else [whole])
        ]
        if self._suspect is not None:
            self._trace.append(shown)
            is_end = any(message.startswith(_TRACE_ENDS) for message in messages)
            if is_end or len(self._trace) >= MAX_TRACE_LINES:
                return False, self._finished()
            return False, None
        text = _CONTROL_SEQUENCE.sub("", whole.decode("utf-8", "backslashreplace"))
        kind, pattern = self._classifier.class_of(messages, text, is_booting=self._is_booting)
        if not kind:
            self._before.append(shown)
            return False, None
        self._suspect = Finding(
            kind=kind, line=shown, pattern=pattern, before=tuple(self._before)
        )
        if any(message.startswith(_TRACE_ENDS) for message in messages):
            return True, self._finished()
        return True, None

    def _finished(self) -> Finding | None:
        if self._suspect is None or self._is_done:
            return None
        self._is_done = True
        return self._suspect.replace(trace=tuple(self._trace))


def shown_line(line: bytes) -> str:
    """Return ``line`` of a console as it is shown elsewhere: no colours, nothing unprintable."""
    text = line.decode("utf-8", "backslashreplace")
    return escape(_CONTROL_SEQUENCE.sub("", text).rstrip().expandtabs())
