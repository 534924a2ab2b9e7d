"""A guest's output on its way out: every byte to a pipe, nothing that acts to a terminal."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.report import escape
from pyvmm.testing import passed_on
from pyvmm.testing.passed_on import PassedOn


def through(*pieces: bytes, is_terminal: bool) -> bytes:
    fd = os.memfd_create("out")
    try:
        way = PassedOn(fd, is_terminal=is_terminal)
        for piece in pieces:
            way.write(piece)
        way.end()
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_a_pipe_gets_every_byte(pieces: list[bytes]) -> None:
    assert through(*pieces, is_terminal=False) == b"".join(pieces)


@pytest.mark.parametrize(("data", "shown"), [
    (b"plain\n\ttext\r\n", b"plain\n\ttext\r\n"),
    (b"50%\r60%\r", b"50%\r60%\r"),
    (b"\x1b[31;1mred\x1b[0m", b"\x1b[31;1mred\x1b[0m"),
    (b"\x1b[38:5:1mx", b"\x1b[38:5:1mx"),
    (b"\x1b[2J\x1b[6n\x1b]0;title\x07", b"\\x1b[2J\\x1b[6n\\x1b]0;title\\x07"),
    (b"\x9b6n\xff", b"\\x9b6n\\xff"),
    ("\u202egrüß\U0001f600".encode(), "\\u202egrüß\U0001f600".encode()),
    (b"\x1b", b"\\x1b"),
])
def test_a_terminal_gets_text_and_colours(data: bytes, shown: bytes) -> None:
    assert through(data, is_terminal=True) == shown + b"\x1b[0m"
    single = [data[at : at + 1] for at in range(len(data))]
    assert through(*single, is_terminal=True) == shown + b"\x1b[0m", "byte by byte"


@given(st.binary(max_size=200))
def test_a_terminal_never_gets_another_control_character(data: bytes) -> None:
    import re

    shown = through(data, is_terminal=True).decode()
    rest = re.sub(r"\x1b\[[0-9;:]*m|[\n\r\t]", "", shown)
    assert escape(rest) == rest


def test_output_is_there_at_once() -> None:
    read_fd, write_fd = os.pipe()
    way = PassedOn(write_fd)
    way.write(b"no line end")
    assert os.read(read_fd, 100) == b"no line end"
    assert not way.line_ended
    os.close(read_fd)
    os.close(write_fd)


def test_a_slow_reader_gets_all() -> None:
    read_fd, write_fd = os.pipe()
    data, got = os.urandom(1 << 20), bytearray()

    def read() -> None:
        while piece := os.read(read_fd, 1000):
            got.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    way = PassedOn(write_fd)
    way.write(data)
    os.close(write_fd)
    reader.join()
    os.close(read_fd)
    assert bytes(got) == data
    assert way.problem is None


def test_a_reader_that_is_gone_is_a_problem_and_no_error() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    way = PassedOn(write_fd)
    way.write(b"x")
    way.write(b"y")
    assert isinstance(way.problem, BrokenPipeError)
    os.close(write_fd)


def test_a_reader_that_takes_nothing_is_given_up_once_the_run_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passed_on, "PATIENCE_S", 0.2)
    read_fd, write_fd = os.pipe()
    end_s = time.monotonic() + 0.5
    way = PassedOn(write_fd, gives_up=lambda: time.monotonic() > end_s)
    way.write(bytes(1 << 20))
    assert time.monotonic() > end_s
    assert way.problem is not None
    assert way.problem.strerror == "its reader takes nothing"
    os.close(read_fd)
    os.close(write_fd)


def test_a_full_disk_is_a_problem(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as file:
        way = PassedOn(file.fileno())
        way.write(b"x")
    assert way.problem is not None
    assert way.problem.strerror == "No space left on device"
