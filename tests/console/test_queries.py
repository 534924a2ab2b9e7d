"""Which bytes make a terminal answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.console.queries import QueryWatch
from tests.support.terminal_bench import ANSWERS

SILENT = (
    b"", b"plain text\r\n\x07\x08\t", b"\x1b[m", b"\x1b[0;1;31m", b"\x1b[38:2::1:2:3m", b"\x1b[2J",
    b"\x1b[H", b"\x1b[10;20H", b"\x1b[K", b"\x1b[?25h", b"\x1b[?2004l", b"\x1b[?1049h", b"\x1b7",
    b"\x1b8", b"\x1bM", b"\x1b=", b"\x1b(B", b"\x1b[2 q", b"\x1b[s\x1b[u", b"\x1b[1;24r",
    b"\x1b]0;a title\x07", b"\x1b]0;a title\x1b\\", "Û 中文 “x”".encode(), b"\x1b]2;why?\x07",
    b"\x1b]8;;http://host/?a=b\x1b\\link?\x1b]8;;\x1b\\", b"\x1b]52;c;eA==\x07", b"\x1b]104\x07",
    b"\x1b]4;1;#fff\x1b\\", b"\x1b]111\x1b\\", b"\x1b]133;A\x07what?", b"\x1b]7;file:///\x07",
    b"\x1b]3008;start=1\x1b\\", b"\x1b%G" + "Û6n".encode(), b"\x1b[?1049s\x1b[?1049r",
)
ASKING = (
    *ANSWERS, b"\x1b[6\nn", b"\x1b[6\x00n", b"\x1b\x1b[6n", b"\x1b[?6n", b"\x1b[=c", b"\x1b[>q",
    b"\x1b[?u", b"\x1b[?1$p", b"\x1b[14t", b"\x1b]10;?\x1b\\", b"\x1b]52;c;?\x07",
    b"\x1b_Gi=1\x1b\\",
    b"\x1b]60\x07", b"\x1b]61;allowColorOps\x1b\\", b"\x1b]1337;ReportCellSize\x07",
    b"\x1b]99;i=1;x\x07",
    b"\x1b]60\xc2\x9c", b"\x1b%@\x9b6n", b"\x1b%\n@\x9bc", b"\x1b]0;x\x07\x1b]060\x07",
    b"\x1b[?1;1;0S", b"\x1b[x", "\x9b6n".encode(), b"\x1b]4;1;?",
)


def asks(*pieces: bytes, utf8: bool = True) -> bool:
    watch = QueryWatch(utf8=utf8)
    for piece in pieces:
        watch.feed(piece)
    return watch.asked_s > 0


@pytest.mark.parametrize("data", SILENT, ids=repr)
def test_what_has_no_answer(data: bytes) -> None:
    assert not asks(data)


@pytest.mark.parametrize("data", ASKING, ids=repr)
def test_fault_3_what_has_an_answer_is_known_however_it_arrives(data: bytes) -> None:
    assert asks(data)
    assert asks(*(bytes((byte,)) for byte in data))
    assert asks(b"before\x1b[0m" + data + b"\x1b[0mafter")


def test_a_sequence_without_an_end_is_not_kept_for_ever() -> None:
    watch = QueryWatch(utf8=True)
    watch.feed(b"\x1b[")
    for _ in range(1000):
        watch.feed(b"1;" * 100)
    assert watch.asked_s
    assert len(watch._partial) < 1000


def test_a_terminal_of_eight_bits_takes_control_bytes() -> None:
    assert asks(b"\x9b6n", utf8=False)
    assert asks(b"\x9a", utf8=False)
    assert not asks("Û".encode(), utf8=True)


def test_modes_that_make_reports() -> None:
    watch = QueryWatch(utf8=True)
    watch.feed(b"\x1b[?1000;1006h\x1b[?10")
    watch.feed(b"04h\x1b[?25h\x1b[1000h")
    assert watch.reports == {1000, 1004}
    watch.feed(b"\x1b[?1000l\x1b[?99999999999999999999h")
    assert watch.reports == {1004}
    assert watch.may_report
    assert not watch.asked_s


@pytest.mark.parametrize("data", [
    b"\x1b[?0000001003h", b"\x1b[?1003h\x1b[?1003\x18l", b"\x1b[?1003h\x1b[?1003\x1al",
    b"\x1b[?1003h\x1b[?1003s\x1b[?1003l\x1b[?1003r", b"\x1b[?9001h", b"\x1b[1;?1003h",
    b"\x1b[?66539h", b"\x1b[?4294968299h", b"\x1b[?1003:1h", b"\x1b[?25;1000h", b"\x1b%@\x9b?1000h",
    b"\xc2\x9b?1000h", b"\x1b[?" + b"0" * 3000 + b"1000h", b"\x1b[?" + b"9" * 5000 + b"h",
], ids=lambda data: repr(data[:40]))
def test_fault_3_a_mode_that_makes_reports_is_known_however_it_is_set(data: bytes) -> None:
    for step in (len(data), 1):
        watch = QueryWatch(utf8=True)
        for at in range(0, len(data), step):
            watch.feed(data[at : at + step])
        # One that is longer than what is kept of it is a query, which is waited for.
        assert watch.reports or watch.may_report or watch.asked_s


def test_modes_that_make_no_reports() -> None:
    watch = QueryWatch(utf8=True)
    watch.feed(b"\x1b[?25h\x1b[?h\x1b[?2004h\x1b[?1049h\x1b[?01;7h\x1b[?1003h\x1b[?01003l")
    assert (watch.reports, watch.may_report, watch.asked_s) == (set(), False, 0.0)


def test_how_much_was_shown_behind_the_last_query() -> None:
    watch = QueryWatch(utf8=True)
    watch.feed(b"\x1b[6n")
    assert watch.bytes_since == 0
    watch.feed(b"text")
    watch.feed(b"more")
    assert watch.bytes_since == 8


@given(before=st.binary(max_size=60).filter(lambda data: b"\x1b" not in data),
       query=st.sampled_from([b"\x1b[6n", b"\x1b[c", b"\x1bZ"]), cut=st.integers(0, 70))
def test_no_text_before_it_hides_a_query(before: bytes, query: bytes, cut: int) -> None:
    data = before + query
    assert asks(data[:cut], data[cut:])
