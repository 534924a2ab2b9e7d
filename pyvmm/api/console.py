"""The guest's console for a script: what it printed, what to type, what to wait for."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

from pyvmm.console.output import LineWatch
from pyvmm.errors import PyvmmError

MAX_KEPT_BYTES = 16 << 20
"""Of what the guest printed, the last so many bytes are kept."""
MAX_MATCH_BYTES = 64 << 10
"""The longest match that ``expect`` finds: so a long wait costs the same at every byte."""
MAX_TYPED_BYTES = 1 << 20
SHOWN_BYTES = 400
"""So much of the console's end is quoted where an expectation failed."""


class ExpectError(PyvmmError):
    """The console did not show what was expected: time was up, or the run has ended."""


class ConsoleHandle:
    """``Machine.console``.  All methods may be called from any thread.

    ``refuse_own_threads`` raises RuntimeError in a thread that must not wait; ``wake`` has the
    thread that keeps house look for typed bytes; ``run_hook`` calls a user's function;
    ``has_begun`` returns True once the machine was started.
    """

    def __init__(
        self,
        *,
        refuse_own_threads: Callable[[str], None],
        wake: Callable[[], None],
        run_hook: Callable[[str, Callable[[str], object], str], None],
        has_begun: Callable[[], bool],
    ) -> None:
        self._refuse_own_threads = refuse_own_threads
        self._wake = wake
        self._run_hook = run_hook
        self._has_begun = has_begun
        self._news = threading.Condition()
        self._kept = bytearray()
        self._kept_from = 0
        """The position, in all that was printed, of the first byte that is kept."""
        self._expected_to = 0
        """The position behind the last match of ``expect``."""
        self._is_over = self._is_closed = False
        self._typed = bytearray()
        self._watchers: list[Callable[[str], object]] = []
        self._lines = LineWatch(self._on_line)

    # For scripts

    @property
    def text(self) -> str:
        """Return what the guest printed, the last MAX_KEPT_BYTES of it.

        Bytes that are no UTF-8 are shown as U+FFFD.
        """
        with self._news:
            return self._kept.decode("utf-8", "replace")

    def write(self, data: str | bytes) -> None:
        """Type ``data``: the guest gets it as soon as it listens.

        PyvmmError if more than MAX_TYPED_BYTES would wait, TypeError for anything but text or
        bytes.
        """
        if isinstance(data, str):
            data = data.encode()
        elif not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"console.write takes str or bytes, not {type(data).__name__}")
        with self._news:
            self._check_open("console.write()")
            if len(self._typed) + len(data) > MAX_TYPED_BYTES:
                raise PyvmmError(
                    f"console.write: the guest has not read {len(self._typed)} bytes yet; at most "
                    f"{MAX_TYPED_BYTES} may wait"
                )
            self._typed += data
        self._wake()

    def expect(self, pattern: str | re.Pattern[str], timeout_s: float = 60.0) -> re.Match[str]:
        """Wait until ``pattern`` matches behind the last match, and return the match.

        A match is at most MAX_MATCH_BYTES long.  ``^`` and ``$`` match at every line,
        and ``$`` at the end of what has come so far: write ``\\n`` for a whole line.  Lines end
        with ``\\n``; the ``\\r`` that a serial port sends before it is left out.  ExpectError after
        ``timeout_s`` seconds, or if the run ends first; it quotes the end of the console.
        RuntimeError in a hook, which would wait for itself.

        ``re`` keeps Python's lock while it searches: a pattern such as ``(a+)+$``, which tries
        without end, holds up the machine, its time limit too.
        """
        self._refuse_own_threads("console.expect()")
        self._check_open("console.expect()")
        wanted = re.compile(pattern, re.MULTILINE) if isinstance(pattern, str) else pattern
        if not isinstance(wanted, re.Pattern) or not isinstance(wanted.pattern, str):
            raise TypeError(f"console.expect takes a text or a pattern of text, not {pattern!r}")
        until_s = time.monotonic() + timeout_s
        searched_to = 0
        while True:
            with self._news:
                # Behind what was searched, but for the beginning of a match.
                start = max(self._expected_to, self._kept_from, searched_to - MAX_MATCH_BYTES)
                # With the byte before it, so that ``^`` knows whether a line begins there.
                before = int(start > self._kept_from)
                data = bytes(self._kept[start - before - self._kept_from :])
                searched_to, is_over = self._kept_from + len(self._kept), self._is_over
            text = data.decode("utf-8", "surrogateescape")
            skipped = before and not text.startswith("\r\n")
            if found := wanted.search(text.replace("\r\n", "\n"), skipped):
                behind = _end_in(text, found.end())
                used = len(text[:behind].encode("utf-8", "surrogateescape"))
                self._expected_to = start - before + used
                return found
            left_s = until_s - time.monotonic()
            if is_over or left_s <= 0:
                why = "the run has ended" if is_over else f"{timeout_s:g} s have passed"
                if not self._has_begun():
                    why += ", and the machine was not started"
                raise ExpectError(
                    f"{wanted.pattern!r} did not come: {why}; the console ends with "
                    f"{self._tail()!r}"
                )
            with self._news:
                if searched_to == self._kept_from + len(self._kept) and not self._is_over:
                    self._news.wait(left_s)

    def on_line(self, callback: Callable[[str], object]) -> None:
        """Have ``callback`` called with every whole line from now on, without its end.

        It is called in the thread that keeps house, so it must return soon, and may not wait for
        the machine.  A line is cut after 1024 bytes.
        """
        if not callable(callback):
            raise TypeError(f"on_line takes a function, not {type(callback).__name__}")
        self._check_open("console.on_line()")
        self._watchers.append(callback)

    # For the machine

    def feed(self, data: bytes) -> None:
        """Take what the guest printed; in the thread that keeps house."""
        with self._news:
            self._kept += data
            if len(self._kept) > MAX_KEPT_BYTES + (1 << 20):
                excess = len(self._kept) - MAX_KEPT_BYTES
                del self._kept[:excess]
                self._kept_from += excess
            self._news.notify_all()
        if self._watchers:
            self._lines.feed(data)

    def hand_over(self, receive: Callable[[bytes], int]) -> bool:
        """Offer typed bytes to ``receive``, which returns how many it took; True if some wait."""
        with self._news:
            waiting = bytes(self._typed[:4096])
        while waiting and (taken := receive(waiting)):
            with self._news:
                del self._typed[:taken]
                waiting = bytes(self._typed[:4096])
        return bool(waiting)

    def begin_anew(self, unfinished: bytes) -> None:
        """The guest is an earlier one, which has printed ``unfinished`` of its line.

        ``text`` keeps all that was printed.  ``expect`` looks behind it from now on, and typed
        bytes that the guest has not got are forgotten.
        """
        with self._news:
            self._expected_to = self._kept_from + len(self._kept)
            self._typed.clear()
            self._lines.unfinished = unfinished
            self._is_over = False

    def end(self) -> None:
        """The run is over: nobody need wait any longer."""
        with self._news:
            self._is_over = True
            self._news.notify_all()

    def close(self) -> None:
        """The machine is closed: nothing is typed any more, ``text`` stays."""
        self.end()
        self._is_closed = True

    def _check_open(self, call: str) -> None:
        if self._is_closed:
            raise RuntimeError(f"{call}: the machine was closed")

    def _on_line(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        for callback in list(self._watchers):
            self._run_hook("console.on_line", callback, text)

    def _tail(self) -> str:
        return self._kept[-SHOWN_BYTES:].decode("utf-8", "replace")


def _end_in(text: str, plain_end: int) -> int:
    """Return the end in ``text`` of what ends at ``plain_end`` once ``\\r\\n`` are ``\\n``."""
    end = 0
    for part in text.split("\r\n"):
        if plain_end <= len(part):
            return end + plain_end
        plain_end -= len(part) + 1
        end += len(part) + 2
    return len(text)
