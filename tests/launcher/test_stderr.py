"""The lines of a machine's process: a process that a guest has taken over cannot flood the log."""

from __future__ import annotations

import os

from pyvmm.launcher.stderr import BURST, StderrThread
from pyvmm.report import MAX_LINES_AN_HOUR


def reported(data: bytes) -> list[str]:
    """Return the lines that a process with ``data`` on its standard error has reported."""
    lines: list[str] = []
    read_fd, write_fd = os.pipe()
    thread = StderrThread(read_fd, lines.append, name="test stderr")
    thread.release()
    with os.fdopen(write_fd, "wb") as writer:
        writer.write(data)
    thread.join()
    os.close(read_fd)
    return lines


def test_lines_lose_their_prefix() -> None:
    assert reported(b"pyvmm: disk: odd\nother\n") == ["disk: odd", "other"]


def test_a_flood_is_counted() -> None:
    lines = reported(b"pyvmm: me\n" * 100_000)
    assert lines[:BURST] == ["me"] * BURST
    assert len(lines) <= MAX_LINES_AN_HOUR + 10
    counts = [int(line.split()[0][1:]) for line in lines if line != "me"]
    assert lines.count("me") + sum(counts) == 100_000
    assert lines[-1].endswith("more lines of the machine's process were left out)")


def test_a_line_without_an_end_is_cut() -> None:
    lines = reported(b"x" * 10_000_000 + b"\n")
    assert max(map(len, lines)) <= 4096
    assert len(lines) <= MAX_LINES_AN_HOUR + 1
