"""The console's host side: bounded buffer, lines, Ctrl-A, raw terminal, files."""

from __future__ import annotations

import contextlib
import functools
import os
import pty
import termios
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.console.output import LineWatch, OutputBuffer
from pyvmm.console.place import Console
from pyvmm.console.terminal import RawTerminal
from pyvmm.console.typed import EscapeFilter, help_text
from pyvmm.errors import ConfigError
from tests.support.patience import patient


def drained(output: OutputBuffer) -> None:
    while output.pending:
        output.drain()


def test_output_reaches_the_file_and_the_observer_once() -> None:
    read_end, write_end = os.pipe()
    seen, wakes = bytearray(), []
    output = OutputBuffer(write_end, lambda: wakes.append(1), seen.extend)
    output.write(b"hello ")
    output.write(b"world")
    assert wakes == [1], "one wake-up for as long as less than a chunk waits"
    drained(output)
    assert os.read(read_end, 100) == b"hello world" == bytes(seen)
    os.close(read_end)
    os.close(write_end)


def test_without_a_file_the_observer_still_sees_everything() -> None:
    seen = bytearray()
    output = OutputBuffer(None, lambda: None, seen.extend)
    output.write(b"x" * 10_000)
    drained(output)
    assert bytes(seen) == b"x" * 10_000


def test_what_we_say_goes_first_and_the_observer_does_not_see_it() -> None:
    """Else it would be taken for the guest's, or cut in two what the guest says."""
    read_end, write_end = os.pipe()
    seen, wakes = bytearray(), []
    output = OutputBuffer(write_end, lambda: wakes.append(1), seen.extend)
    output.write(b"Kernel pan")
    output.say("\npaused\n")
    output.write(b"ic")
    assert len(wakes) == 2
    output.drain()
    assert output.line_ended
    drained(output)
    assert os.read(read_end, 100) == b"\npaused\nKernel panic"
    assert seen == b"Kernel panic"
    os.close(read_end)
    os.close(write_end)


def test_a_full_buffer_makes_the_writer_wait_and_loses_nothing() -> None:
    seen = bytearray()
    output = OutputBuffer(None, lambda: None, seen.extend)
    data = os.urandom(4 * OutputBuffer.LIMIT)

    def guest() -> None:
        for start in range(0, len(data), 1000):
            output.write(data[start : start + 1000])

    writer = threading.Thread(target=guest)
    writer.start()
    most = 0
    while writer.is_alive() or output.pending:
        most = max(most, len(output._data))
        output.drain()
    writer.join()
    assert bytes(seen) == data
    assert most <= OutputBuffer.LIMIT + 1000


def test_shutting_lets_a_waiting_writer_go() -> None:
    output = OutputBuffer(None, lambda: None, lambda _: None)

    def guest() -> None:
        for _ in range(100):
            output.write(b"x" * 1000)

    writer = threading.Thread(target=guest)
    writer.start()
    output.shut()
    writer.join(patient(10))
    assert not writer.is_alive()


def test_a_host_that_refuses_raises_and_does_not_repeat() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    output = OutputBuffer(write_end, lambda: None, lambda _: None)
    output.write(b"x")
    with pytest.raises(BrokenPipeError):
        output.drain()
    assert not output.pending
    os.close(write_end)


def test_a_pipe_that_is_full_keeps_the_bytes() -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 4096)
    output = OutputBuffer(write_end, lambda: None, lambda _: None)
    output.write(b"later")
    output.drain()
    assert output.pending
    os.close(read_end)
    os.close(write_end)


@given(chunks=st.lists(st.binary(max_size=40), max_size=30))
def test_lines_do_not_depend_on_how_the_bytes_arrive(chunks: list[bytes]) -> None:
    lines: list[bytes] = []
    watch = LineWatch(lines.append)
    for chunk in chunks:
        watch.feed(chunk)
    whole = b"".join(chunks).split(b"\n")[:-1]
    assert lines == [line.rstrip(b"\r") for line in whole]


def test_an_endless_line_is_cut_not_kept() -> None:
    lines: list[bytes] = []
    watch = LineWatch(lines.append)
    for _ in range(100):
        watch.feed(b"x" * 1000)
    watch.feed(b"\nnext\n")
    assert [len(line) for line in lines] == [LineWatch.LIMIT, 4]


@pytest.mark.parametrize(("typed", "passed", "called"), [
    (b"ls\r", b"ls\r", []),
    (b"\x01x", b"", ["quit"]),
    (b"\x01p\x01P", b"", ["pause", "pause"]),
    (b"\x01?", b"", ["help"]),
    (b"\x01\x01", b"\x01", []),
    (b"a\x01bc", b"a\x01bc", []),
    (b"\x03\x1a\x04", b"\x03\x1a\x04", []),
])
def test_ctrl_a_sequences(typed: bytes, passed: bytes, called: list[str]) -> None:
    calls: list[str] = []
    names = ("quit", "pause", "help")
    whole, bytewise = (
        EscapeFilter(*(functools.partial(calls.append, name) for name in names)) for _ in range(2)
    )
    assert whole.feed(typed) == passed
    assert calls == called
    assert b"".join(bytewise.feed(bytes([b])) for b in typed) == passed


def test_ctrl_a_s_is_ours_only_if_there_is_a_snapshot_to_take() -> None:
    calls: list[str] = []
    keys = [functools.partial(calls.append, name) for name in ("quit", "pause", "help", "snapshot")]
    assert EscapeFilter(*keys[:3]).feed(b"a\x01sb") == b"a\x01sb"
    assert calls == []
    assert EscapeFilter(*keys).feed(b"a\x01sb\x01S") == b"ab"
    assert calls == ["snapshot", "snapshot"]


@pytest.mark.parametrize("has_snapshot", [False, True])
def test_the_help_has_the_keys_that_are_ours(has_snapshot: bool) -> None:
    text = help_text(has_snapshot=has_snapshot)
    assert ("Ctrl-A s" in text) == has_snapshot
    assert all(f"Ctrl-A {key}" in text for key in ("x", "p", "?", "Ctrl-A"))


def test_raw_mode_is_undone_also_after_an_error() -> None:
    pid, master = pty.fork()
    if pid == 0:  # the child has the terminal as its controlling one
        before = termios.tcgetattr(0)
        status = 1
        try:
            with RawTerminal(0) as terminal:
                raw = termios.tcgetattr(0)
                if terminal.active and not raw[3] & (termios.ECHO | termios.ISIG | termios.ICANON):
                    raise KeyError
        except KeyError:
            status = 0 if termios.tcgetattr(0) == before else 2
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    os.close(master)
    assert os.waitstatus_to_exitcode(status) == 0


def test_what_is_no_terminal_is_left_alone() -> None:
    read_end, write_end = os.pipe()
    with RawTerminal(read_end) as terminal:
        assert not terminal.active
    os.close(read_end)
    os.close(write_end)


def test_a_console_file_is_written_and_closed(tmp_path: Path) -> None:
    console = Console.open(str(tmp_path / "boot.log"))
    assert console.output_fd is not None
    os.write(console.output_fd, b"booted")
    console.close()
    console.close()
    assert (tmp_path / "boot.log").read_bytes() == b"booted"


def test_a_console_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    where = str(tmp_path / "missing" / "boot.log")
    with pytest.raises(ConfigError, match="--console") as caught:
        Console.open(where)
    assert where in str(caught.value)


def test_console_none_has_neither_input_nor_output() -> None:
    console = Console.open("none")
    assert (console.input_fd, console.output_fd) == (None, None)
