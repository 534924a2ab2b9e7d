"""Pumps: bytes in order, one step at a time, and what the two ends do to each other."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.lab.streams import (
    Input,
    Keyboard,
    Lines,
    Output,
    Signals,
    Source,
    Tail,
    describe,
    split_at_mark,
)

MARK = b"\0mark"


@pytest.fixture
def port() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the machine's end, ours)."""
    theirs, ours = socket.socketpair()
    ours.setblocking(False)
    with theirs, ours:
        yield theirs, ours


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(reading end, writing end)."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def run(source: Source) -> None:
    """Step while what it waits for is there."""
    while wait := source.waiting_for():
        poller = select.poll()
        fd, is_output = wait
        poller.register(fd, select.POLLOUT if is_output else select.POLLIN)
        if not poller.poll(0):
            return
        source.step()


@settings(deadline=None)
@given(st.binary(max_size=40), st.lists(st.integers(1, 5), max_size=40), st.binary(max_size=4))
def test_split_at_mark_finds_it_however_it_is_cut(
    data: bytes, cuts: list[int], behind: bytes
) -> None:
    stream = data.replace(MARK, b"") + MARK + behind
    expected = stream.partition(MARK)[0]
    got, held, found = b"", b"", False
    at = 0
    for size in [*cuts, len(stream)]:
        piece, at = stream[at : at + size], at + size
        if not found:
            before, held, found = split_at_mark(held + piece, MARK)
            got += before
    assert found
    assert got == expected


def test_split_at_mark_holds_back_only_what_may_begin_it() -> None:
    assert split_at_mark(b"text", MARK) == (b"text", b"", False)
    assert split_at_mark(b"text\0ma", MARK) == (b"text", b"\0ma", False)
    assert split_at_mark(b"text\0max", MARK) == (b"text\0max", b"", False)
    assert split_at_mark(b"text\0markmore", MARK) == (b"text", b"", True)


def test_output_is_complete_at_the_mark(
    port: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    theirs, ours = port
    output = Output(ours.fileno(), pipe[1], MARK, lambda error: None)
    theirs.sendall(b"one\0ma")
    run(output)
    assert os.read(pipe[0], 100) == b"one"
    assert output.waiting_for() == (ours.fileno(), False)
    theirs.sendall(b"rk")
    run(output)
    assert output.complete
    assert output.waiting_for() is None


def test_output_of_a_machine_that_died_is_delivered_to_the_last_byte(
    port: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    theirs, ours = port
    output = Output(ours.fileno(), pipe[1], MARK, lambda error: None)
    theirs.sendall(b"x\0ma")
    theirs.close()
    run(output)
    assert output.complete
    assert os.read(pipe[0], 100) == b"x\0ma"


def test_a_full_sink_stops_the_reading(
    port: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    theirs, ours = port
    output = Output(ours.fileno(), pipe[1], MARK, lambda error: None)
    theirs.setblocking(False)
    sent = 0
    while True:
        try:
            sent += theirs.send(bytes(range(1, 256)) * 16)
        except BlockingIOError:
            run(output)
            if output.pending:
                break
    assert output.waiting_for() == (pipe[1], True)
    received = bytearray()
    while len(received) < sent:
        received += os.read(pipe[0], 1 << 16)
        run(output)
    assert bytes(received) == (bytes(range(1, 256)) * (sent // 255 + 1))[:sent]


def test_a_sink_that_went_away_is_reported_once(port: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = port
    read_end, write_end = os.pipe()
    os.close(read_end)
    errors: list[OSError] = []
    output = Output(ours.fileno(), write_end, MARK, errors.append)
    theirs.sendall(b"text")
    run(output)
    os.close(write_end)
    assert [describe(error) for error in errors] == [None]
    assert output.complete


def test_a_full_disk_has_a_description(port: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = port
    errors: list[OSError] = []
    with Path("/dev/full").open("wb", buffering=0) as full:
        output = Output(ours.fileno(), full.fileno(), MARK, errors.append)
        theirs.sendall(b"text")
        run(output)
    assert [describe(error) for error in errors] == ["No space left on device"]


def test_input_passes_on_bytes_and_their_end(
    port: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    theirs, ours = port
    file = tmp_path / "file"
    file.write_bytes(b"bytes")
    with file.open("rb") as source:
        pump = Input(source.fileno(), ours)
        run(pump)
    assert theirs.recv(100) == b"bytes"
    assert theirs.recv(100) == b""
    assert pump.ended


@pytest.mark.parametrize(
    ("keys", "escapes"),
    [([b"\x1d\x1d\x1d"], 1), ([b"\x1d", b"a\x1d\x1d", b"\x1d"], 1), ([b"\x1d\x1d", b"a\x1d"], 0)],
)
def test_three_escape_keys_in_a_row(
    keys: list[bytes],
    escapes: int,
    port: tuple[socket.socket, socket.socket],
    pipe: tuple[int, int],
) -> None:
    theirs, ours = port
    calls: list[None] = []
    keyboard = Keyboard(pipe[0], ours, lambda: calls.append(None))
    for part in keys:
        os.write(pipe[1], part)
        run(keyboard)
    assert len(calls) == escapes
    assert theirs.recv(100) == b"".join(keys)


def test_lines_wait_for_their_newline(port: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = port
    got: list[str] = []
    lines = Lines(ours.fileno(), got.append)
    for part in (b"rea", b"dy\nexit 1\nfa", b"il \xff\n"):
        theirs.sendall(part)
        run(lines)
    assert got == ["ready", "exit 1", "fail \ufffd"]


def test_signals_are_bytes(pipe: tuple[int, int]) -> None:
    got: list[int] = []
    os.write(pipe[1], bytes([2, 15]))
    run(Signals(pipe[0], got.append))
    assert got == [2, 15]


def test_tail_keeps_the_last_lines_and_echoes_all(
    port: tuple[socket.socket, socket.socket],
) -> None:
    theirs, ours = port
    shown = bytearray()
    tail = Tail(ours.fileno(), shown.extend)
    for part in (b"x" * Tail.LIMIT, b"\r\n\r\none\r\ntwo\r\n"):
        theirs.sendall(part)
        run(tail)
    assert tail.lines(2) == ["one", "two"]
    assert shown.endswith(b"one\r\ntwo\r\n")
