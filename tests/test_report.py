"""Reporter: one line each, at a bounded rate, and no control character of a guest's."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import socket
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest

from pyvmm.report import MAX_LINE, REPEAT_S, Outlet, RepeatFilter, Reporter

F_SETPIPE_SZ = 1031  # linux/fcntl.h


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


def test_what_is_said_again_and_again_is_said_seldom() -> None:
    now_s = [0.0]
    said: list[str] = []
    report = RepeatFilter(said.append, clock=lambda: now_s[0])
    for _ in range(3):
        report("a")
        report("b")
        now_s[0] += REPEAT_S / 4
    assert said == ["a", "b"]
    now_s[0] = REPEAT_S
    report("a")
    report("a")
    assert said == ["a", "b", "a"]
    for number in range(1000):  # of which not all are remembered
        report(str(number))
    report("a")
    report("999")
    assert said[-2:] == ["999", "a"]


class Listener:
    """Somebody at the other end of ``stream``, who may have stopped reading."""

    def __init__(self, stack: contextlib.ExitStack, reader: int, writer: int) -> None:
        stack.callback(os.close, reader)
        self._reader = reader
        self._stack = stack
        self.stream: TextIO = stack.enter_context(os.fdopen(writer, "w"))

    def reporter(self) -> Reporter:
        """One that speaks to it."""
        return self._stack.enter_context(
            contextlib.closing(Reporter(self.stream, burst=100_000))
        )

    def read(self) -> str:
        """All that can be read now."""
        os.set_blocking(self._reader, False)
        data = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._reader, 1 << 16):
                data += piece
        return data.decode().replace("\r\n", "\n")


def pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)
    return reader, writer


def sockets() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.fixture(params=[pipe, pty.openpty, sockets])
def listener(request: pytest.FixtureRequest) -> Iterator[Listener]:
    make: Callable[[], tuple[int, int]] = request.param
    before = sorted(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        yield Listener(stack, *make())
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_nobody_waits_for_a_listener_who_does_not_read(listener: Listener) -> None:
    report = listener.reporter()
    lines = [f"line {number} {'x' * 90}" for number in range(10_000)]
    for line in lines:
        report(line)  # would hang here
    assert os.get_blocking(listener.stream.fileno())  # which others have, too
    heard = listener.read()
    report("later")
    heard += listener.read()
    whole = re.findall(r"^pyvmm: (line \d+ x{90})$", heard, re.MULTILINE)
    # In order; a terminal's buffer may empty into another meanwhile, and have room again.
    rest = iter(lines)
    assert all(line in rest for line in whole)
    assert heard.endswith("\npyvmm: later\n")
    left_out = re.findall(r"^pyvmm: \((\d+) more lines like these were left out\)$", heard, re.M)
    # The last line that a terminal had room for, each time, may lack its end alone.
    assert 0 <= len(whole) + sum(map(int, left_out)) - len(lines) <= max(1, len(left_out))


def test_what_is_left_out_is_said_at_the_end(listener: Listener) -> None:
    report = listener.reporter()
    for _ in range(10_000):
        report("x" * 90)
    report.close()
    listener.read()
    report.close()
    report.close()
    assert listener.read().count("more lines like these") == 1


def test_a_terminal_that_cannot_be_opened_again(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, after su."""

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    report = listener.reporter()
    report("first")
    for _ in range(40):
        report("x" * 4000)
    assert listener.read().startswith("pyvmm: first\n")


def test_an_endless_line_is_cut(listener: Listener) -> None:
    listener.reporter()("\N{SNOWMAN}" * 4000)
    heard = listener.read()
    assert heard == "pyvmm: " + "\N{SNOWMAN}" * MAX_LINE + "\n"


def test_a_listener_who_has_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        report = Reporter(stream)
        report("nobody hears")
        report.close()


@pytest.mark.parametrize("make", [pipe, pty.openpty, sockets])
def test_fault_40_an_outlet_writes_without_opening_anything(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[int, int]]
) -> None:
    reader, writer = make()
    before = sorted(os.listdir("/proc/self/fd"))
    outlet = Outlet(writer)
    with monkeypatch.context() as patch:
        for name in ("open", "dup", "fstat"):
            patch.setattr(os, name, None)
        assert outlet.write(b"hello\n") == 6
        with contextlib.suppress(BlockingIOError):
            while outlet.write(b"x" * 1000):
                pass  # would hang here
    outlet.close()
    outlet.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(OSError, match="closed"):
        outlet.write(b"x")
    assert os.get_blocking(writer)
    os.close(reader)
    os.close(writer)
