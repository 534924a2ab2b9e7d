"""Checks that several targets make."""

from __future__ import annotations


def check_one_line(text: object, *, begins: str = "") -> None:
    """Assert that ``text``, an error or a report, is one line, and how it begins."""
    line = str(text)
    assert line, "it says nothing"
    assert "\n" not in line, line
    assert line.startswith(begins), line


def check_printable(text: object) -> None:
    """Assert that ``text`` is one line of printable characters."""
    check_one_line(text)
    assert str(text).isprintable(), text
