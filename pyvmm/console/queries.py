"""Find queries in the output to a terminal: sequences that the terminal answers.

ECMA-48; xterm's "Control Sequences".  A sequence of an unknown kind counts as a query.  That costs
the end of a run a second, while a missed query types into somebody's shell.
"""

from __future__ import annotations

import time

_ENQ = 0x05
_MAX_BYTES = 256
"""Bytes of a sequence that has no end yet; a longer one counts as a query."""
_CONTROLS = bytes(range(0x20)) + b"\x7f"  # they take effect inside a sequence, and do not end it
_EIGHT_BIT = {
    0x90: b"\x1bP", 0x9A: b"\x1bZ", 0x9B: b"\x1b[", 0x9C: b"\x1b\\", 0x9D: b"\x1b]", 0x9F: b"\x1b_"
}
"""C1 controls, and their seven-bit forms."""
_SILENT = b"@ABCDEFGHIJKLMPXZ`abdefghklmrsuST"
"""Final bytes of control sequences that have no answer, if there is no private mark.  They move the
cursor, erase, insert, delete, scroll, set modes, colours and margins."""
_REPORTING = frozenset({9, 1000, 1001, 1002, 1003, 1004, 2031, 2048, 5522, 9001})
"""Modes in which a terminal reports the mouse, the focus, its colours, its size, pasted data and
released keys unasked."""
REPORTS_OFF = b"".join(b"\x1b[?%dl" % mode for mode in sorted(_REPORTING))
"""Switches all of these modes off."""
_MOST = 65535
"""Terminals keep a parameter in 16 bits: some cut a larger one off, some count on."""
_SILENT_COMMANDS = frozenset({0, 1, 2, 7, 8, 9, 133, 777, 3008})
"""Operating system commands that have no answer: titles, directories, links, notices, marks."""
_SETTING_COMMANDS = frozenset({4, 5, *range(10, 20), 22, 52, 104, 105, 106, *range(110, 120)})
"""Commands that have an answer only if there is a ``?`` among the values to set."""


class QueryWatch:
    """Watches output for queries.

    ``asked_s`` is the time of the last query on the monotonic clock; 0.0 if there was none.
    ``reports`` are the reporting modes that are switched on.  ``may_report`` is True if the
    terminal may be in other reporting modes too.

    A terminal of ``utf8`` takes a C1 control only as a character, because the byte may be part of
    another.  That ends when it is told to leave UTF-8.
    """

    def __init__(self, *, utf8: bool) -> None:
        self._introducers: list[tuple[bytes, bytes]] = []
        self._begins = {0x1B, _ENQ}
        self._is_utf8 = utf8
        self._take_controls(utf8=utf8)
        self.asked_s = 0.0
        self.bytes_since = 0
        """The number of bytes shown behind the last query, at least."""
        self.reports: set[int] = set()
        self.may_report = False
        self._partial = b""

    def _take_controls(self, *, utf8: bool) -> None:
        self._introducers += [
            (chr(code).encode() if utf8 else bytes((code,)), sequence)
            for code, sequence in _EIGHT_BIT.items()
        ]
        self._begins |= {0xC2} if utf8 else set(range(0x80, 0xA0))
        self._defused = bytes(0x3F if byte in self._begins else byte for byte in range(256))

    def defused(self, data: bytes) -> bytes:
        """Return ``data`` with a ``?`` for each byte that begins a sequence, or is a query."""
        return data.translate(self._defused)

    def feed(self, data: bytes) -> None:
        """Take bytes that were shown, behind those before."""
        self.bytes_since += len(data)
        data = self._partial + data
        was_utf8 = self._is_utf8
        asked = self._look_through(data)
        if self._is_utf8 != was_utf8:
            self._take_controls(utf8=False)
            asked = self._look_through(data) or asked
        if asked:
            self.asked_s, self.bytes_since = time.monotonic(), 0

    def _look_through(self, data: bytes) -> bool:
        """True if there is a query in ``data``; the beginning of one is kept."""
        self._partial = b""
        asked = _ENQ in data
        for introducer, sequence in self._introducers:
            data = data.replace(introducer, sequence)
        _, *parts = data.split(b"\x1b")
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            answer = self._judge(part, is_last=is_last)
            if answer is None and is_last:
                if len(part) < _MAX_BYTES:
                    self._partial = b"\x1b" + part
                else:
                    asked = True
            asked = asked or bool(answer)
        if not self._partial and data.endswith(b"\xc2"):
            self._partial = b"\xc2"  # the first half of a C1 control in UTF-8
        return asked

    def _judge(self, part: bytes, *, is_last: bool) -> bool | None:
        """True if ``part``, which follows an ESC, is a query; None if it has no end yet."""
        body = part.translate(None, _CONTROLS)
        kind = body[:1]
        if kind in (b"P", b"_", b"Z"):  # DCS, APC, DECID
            return True
        if kind == b"]":  # OSC, which a BEL ends, or the ESC of an ST
            text, bell, _ = part.partition(b"]")[2].partition(b"\x07")
            is_whole = bool(bell) or not is_last
            return _judge_command(text.translate(None, _CONTROLS), is_whole=is_whole)
        if kind == b"%":  # ISO 2022: another coding system; G is UTF-8
            if len(body) == 1:
                return None
            self._is_utf8 = self._is_utf8 and body[1:2] == b"G"
            return False
        if kind != b"[":
            return False if kind else None
        for place, byte in enumerate(body[1:], 1):
            if 0x40 <= byte <= 0x7E:
                is_clean = part[: place + 1] == body[: place + 1]  # no CAN, which aborts it
                return self._judge_control(body[1:place], byte, is_clean=is_clean)
        return None

    def _judge_control(self, parameters: bytes, final: int, *, is_clean: bool) -> bool:
        """True if CSI ``parameters`` ``final`` is a query; note modes that make reports."""
        if final in b"hlrs" and b"?" in parameters:
            for number in parameters.replace(b"?", b"").split(b";"):
                self._note_mode(number, final, is_clean=is_clean)
            return False
        if final in b"JK" and parameters[:1] == b"?":  # selective erase
            return False
        if final == 0x71 and parameters[-1:] == b" ":  # cursor style
            return False
        if final == 0x6D and parameters[:1] == b">":  # how keys are reported
            return False
        is_plain = not parameters.translate(None, b"0123456789;:")
        return not (is_plain and final in _SILENT)

    def _note_mode(self, number: bytes, final: int, *, is_clean: bool) -> None:
        """Note that mode ``number`` is set (h), reset (l), saved (s) or restored (r)."""
        mode = _small(number)
        if final in b"hr":
            if mode in _REPORTING:
                self.reports.add(mode)
            self.may_report = self.may_report or (mode is None and number != b"")
        elif final == 0x6C and is_clean and mode is not None:
            self.reports.discard(mode)


def _small(number: bytes) -> int | None:
    """Return the parameter ``number``; None if it is none, or terminals differ about it."""
    digits = number.lstrip(b"0") or number[-1:]
    if not digits.isdigit() or len(digits) > 5 or int(digits) > _MOST:
        return None
    return int(digits)


def _judge_command(text: bytes, *, is_whole: bool) -> bool | None:
    """True if the operating system command ``text`` is a query; None if that is open yet."""
    number, semicolon, values = text.partition(b";")
    if not is_whole and not semicolon and not text.translate(None, b"0123456789"):
        return None
    command = _small(number)
    is_silent = command in _SILENT_COMMANDS or (
        command in _SETTING_COMMANDS and b"?" not in values
    )
    if not is_silent:
        return True
    return False if is_whole else None
