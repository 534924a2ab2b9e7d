"""Finds, in what is shown on a terminal, what the terminal will answer to (ECMA-48; xterm's
"Control Sequences").

Rather once too often: a sequence of an unknown kind counts as a query.  That costs the end of a
run a second, and a query that is missed types into somebody's shell.
"""

from __future__ import annotations

import time

_ENQ = 0x05
_MAX_BYTES = 256
"""Of a sequence that has no end yet; what is longer counts as a query."""
_CONTROLS = bytes(range(0x20)) + b"\x7f"  # they take effect inside a sequence, and do not end it
_EIGHT_BIT = {0x90: b"\x1bP", 0x9A: b"\x1bZ", 0x9B: b"\x1b[", 0x9D: b"\x1b]", 0x9F: b"\x1b_"}
"""C1 controls, and what they are in seven bits."""
_SILENT = b"@ABCDEFGHIJKLMPXZ`abdefghklmrsuST"
"""Final bytes of control sequences that have no answer, if there is no private mark: they move the
cursor, erase, insert, delete, scroll, set modes, colours and margins."""
_REPORTING = frozenset({9, 1000, 1001, 1002, 1003, 1004, 2031, 2048})
"""Modes in which a terminal tells of the mouse, the focus, its colours and size unasked."""


class QueryWatch:
    """``asked_s`` is when the last query was shown, on the monotonic clock; 0.0: none was.

    ``reports`` are the modes that were switched on, of those that make a terminal report.  A
    terminal of ``utf8`` takes a C1 control as a character only: the byte may be part of another.
    """

    def __init__(self, *, utf8: bool) -> None:
        self._introducers = [
            (chr(code).encode() if utf8 else bytes((code,)), sequence)
            for code, sequence in _EIGHT_BIT.items()
        ]
        begins = {0x1B, _ENQ, *({0xC2} if utf8 else range(0x80, 0xA0))}
        self._defused = bytes(0x3F if byte in begins else byte for byte in range(256))
        self.asked_s = 0.0
        self.reports: set[int] = set()
        self._partial = b""

    def defused(self, data: bytes) -> bytes:
        """Return ``data`` with a ``?`` for each byte that begins a sequence, or is a query."""
        return data.translate(self._defused)

    def feed(self, data: bytes) -> None:
        """These bytes were shown, behind those before."""
        data = self._partial + data
        self._partial = b""
        asked = _ENQ in data
        for introducer, sequence in self._introducers:
            data = data.replace(introducer, sequence)
        _, *parts = data.split(b"\x1b")
        for index, part in enumerate(parts):
            body = part.translate(None, _CONTROLS)
            answer = self._judge(body, is_whole=b"\x07" in part)
            if answer is None and index == len(parts) - 1:
                if len(part) < _MAX_BYTES:
                    self._partial = b"\x1b" + part
                else:
                    asked = True
            asked = asked or bool(answer)
        if not self._partial and data.endswith(b"\xc2"):
            self._partial = b"\xc2"  # the first half of a C1 control in UTF-8
        if asked:
            self.asked_s = time.monotonic()

    def _judge(self, body: bytes, *, is_whole: bool) -> bool | None:
        """Whether what follows an ESC is a query; None if it has no end yet."""
        kind = body[:1]
        if kind in (b"P", b"_", b"Z"):  # DCS, APC, DECID
            return True
        if kind == b"]":  # OSC
            return True if b"?" in body else (False if is_whole else None)
        if kind != b"[":
            return False if kind else None
        for place, byte in enumerate(body[1:], 1):
            if 0x40 <= byte <= 0x7E:
                return self._judge_control(body[1:place], byte)
        return None

    def _judge_control(self, parameters: bytes, final: int) -> bool:
        """Whether CSI ``parameters`` ``final`` is a query; note modes that make reports."""
        if final in b"hl" and parameters[:1] == b"?":
            for number in parameters[1:].split(b";"):
                if number.isdigit() and len(number) < 6 and int(number) in _REPORTING:
                    (self.reports.add if final == 0x68 else self.reports.discard)(int(number))
            return False
        if final in b"JK" and parameters[:1] == b"?":  # selective erase
            return False
        if final == 0x71 and parameters[-1:] == b" ":  # cursor style
            return False
        if final == 0x6D and parameters[:1] == b">":  # how keys are reported
            return False
        is_plain = not parameters.translate(None, b"0123456789;:")
        return not (is_plain and final in _SILENT)
