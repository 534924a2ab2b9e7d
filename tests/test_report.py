"""Reporter: one line each, at a bounded rate, and no control character of a guest's."""

from __future__ import annotations

import io

from pyvmm.report import Reporter


def test_a_line_is_prefixed() -> None:
    out = io.StringIO()
    Reporter(out)("disk: tail ignored")
    assert out.getvalue() == "pyvmm: disk: tail ignored\n"


def test_a_flood_is_counted_not_printed() -> None:
    now_s = [0.0]
    out = io.StringIO()
    report = Reporter(out, burst=3, period_s=5, clock=lambda: now_s[0])
    for number in range(1000):
        report(f"line {number}")
    assert out.getvalue().count("\n") == 3
    now_s[0] = 6
    report("later")
    report.close()
    assert out.getvalue().splitlines()[3:] == [
        "pyvmm: (997 more lines like these were left out)", "pyvmm: later"
    ]


def test_control_characters_are_escaped() -> None:
    out = io.StringIO()
    Reporter(out)("serial \x1b[31m\n\x07")
    assert out.getvalue() == "pyvmm: serial \\x1b[31m\\n\\x07\n"


def test_a_closed_stream_is_survived() -> None:
    out = io.StringIO()
    out.close()
    Reporter(out)("nobody hears")
