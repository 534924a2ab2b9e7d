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
    b"\x1b]0;a title\x07", b"\x1b]0;a title\x1b\\", "Û 中文 “x”".encode(),
)
ASKING = (
    *ANSWERS, b"\x1b[6\nn", b"\x1b[6\x00n", b"\x1b\x1b[6n", b"\x1b[?6n", b"\x1b[=c", b"\x1b[>q",
    b"\x1b[?u", b"\x1b[?1$p", b"\x1b[14t", b"\x1b]10;?\x1b\\", b"\x1b]52;c;?\x07",
    b"\x1b_Gi=1\x1b\\",
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
    assert not watch.asked_s


@given(before=st.binary(max_size=60).filter(lambda data: b"\x1b" not in data),
       query=st.sampled_from([b"\x1b[6n", b"\x1b[c", b"\x1bZ"]), cut=st.integers(0, 70))
def test_no_text_before_it_hides_a_query(before: bytes, query: bytes, cut: int) -> None:
    data = before + query
    assert asks(data[:cut], data[cut:])
