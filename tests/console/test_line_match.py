"""A line of the console that --snapshot-at waits for: however its bytes come."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvmm.console.line_match import LineMatch, line_pattern
from pyvmm.console.output import LineWatch
from pyvmm.errors import ConfigError

TEXT = b"[    1.5] Run /sbin/init\r\nDebian GNU/Linux 12 vm ttyS0\r\n\r\nvm login: "


def found(pattern: str, *pieces: bytes) -> int:
    """How often ``pattern`` was found in ``pieces``, fed one after another."""
    count = []
    match = LineMatch(line_pattern("--snapshot-at", pattern), lambda: count.append(1))
    for piece in pieces:
        match.feed(piece)
    return len(count)


@pytest.mark.parametrize(("pattern", "is_found"), [
    ("login: $", True), ("^vm login", True), ("^login", False), ("12 vm ttyS0$", True),
    ("Run /sbin/init$", True), ("ttyS0.*login", False), ("(?i)DEBIAN", True), ("nothing", False),
])
def test_a_pattern_is_looked_for_in_each_line(pattern: str, is_found: bool) -> None:
    assert found(pattern, TEXT) == is_found
    assert found(pattern, *(bytes([one]) for one in TEXT)) == is_found


@given(cuts=st.sets(st.integers(0, len(TEXT))))
@example(cuts={len(TEXT) - 3})
def test_it_does_not_matter_where_the_bytes_are_cut(cuts: set[int]) -> None:
    places = sorted({0, *cuts, len(TEXT)})
    pieces = [TEXT[a:b] for a, b in itertools.pairwise(places)]
    assert found("vm login: $", *pieces) == 1
    assert found("Run /sbin/init", *pieces) == 1
    assert found("no login", *pieces) == 0


def test_it_is_found_once() -> None:
    assert found("login", b"login: \nlogin: \n", b"login: ") == 1


def test_a_prompt_is_found_before_its_line_ends() -> None:
    assert found("# $", b"~ # ") == 1


@pytest.mark.parametrize("line", [
    b"vm:~# \x1b[6n", b"\x1b[1;32mvm\x1b[0m:~# ", b"\x1b[?2004hvm:~# ", b"\x1bMvm:~# ",
])
def test_what_a_terminal_does_not_show_is_left_out(line: bytes) -> None:
    """busybox's shell asks where the cursor is, behind each prompt."""
    assert found("^vm:~# $", line) == 1
    assert found("^vm:~# $", *(bytes([one]) for one in line)) == 1


def test_a_line_without_an_end_stays_small() -> None:
    match = LineMatch(re.compile(b"never"), lambda: None)
    for _ in range(100):
        match.feed(b"x" * 4096)
    assert len(match._lines.unfinished) <= LineWatch.LIMIT


def test_bytes_that_are_no_text_are_bytes() -> None:
    assert found("ok", b"\xff\xfe ok") == 1
    assert found("gr\u00fcn", "gr\u00fcn".encode()) == 1


@pytest.mark.parametrize("pattern", ["", "(", "a{99999999999}", "*"])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^--snapshot-at "):
        line_pattern("--snapshot-at", pattern)
