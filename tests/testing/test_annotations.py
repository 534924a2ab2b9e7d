"""Workflow commands of GitHub Actions: ours are escaped, a guest's are none."""

from __future__ import annotations

import os
import threading
import time

import pytest

import pyvmm.testing.annotations as tested
from pyvmm.testing.annotations import Fence, annotation, defused, is_wanted


def test_an_annotation_is_escaped_as_the_runner_reads_it() -> None:
    assert annotation("error", "100%\r\nof it: a, b") == "::error::100%25%0D%0Aof it: a, b"
    assert annotation("error", "x", title="a:b,c%\n", file="a.c", line=3) == (
        "::error file=a.c,line=3,title=a%3Ab%2Cc%25%0A::x"
    )


@pytest.mark.parametrize("line", [
    "::error::evil", "  \t::add-mask::x", "text ##[group]x", "##[command]y",
])
def test_a_line_that_quotes_a_guest_is_no_command(line: str) -> None:
    """actions/runner, ActionCommand.cs: ``::`` begins the line, or ``##[`` is in it."""
    shown = defused(line)
    assert not shown.lstrip().startswith("::")
    assert "##[" not in shown


def test_other_lines_stay_as_they_are() -> None:
    assert defused("a :: b # [c]") == "a :: b # [c]"


@pytest.mark.parametrize(("value", "wanted"), [("true", True), ("", False), ("false", False)])
def test_annotations_are_for_github(value: str, wanted: bool) -> None:
    assert is_wanted({"GITHUB_ACTIONS": value}) is wanted


def test_commands_are_stopped_until_all_of_the_guests_output_is_read() -> None:
    said: list[str] = []
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"::error::evil\n")

    def read_late() -> None:
        time.sleep(0.2)
        said.append(os.read(read_fd, 100).decode())

    reader = threading.Thread(target=read_late)
    with Fence(said.append, (write_fd,)) as fence:
        is_open_inside = fence.is_open
        reader.start()
    reader.join()
    assert (is_open_inside, fence.is_open) == (False, True)
    stop, evil, start = said
    assert stop.startswith("::stop-commands::")
    assert evil == "::error::evil\n"
    assert start == f"::{stop.removeprefix('::stop-commands::')}::"
    os.close(read_fd)
    os.close(write_fd)


def test_output_that_nobody_reads_keeps_commands_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "READ_LIMIT_S", 0.1)
    said: list[str] = []
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"::error::evil\n")
    with Fence(said.append, (write_fd,)) as fence:
        pass
    assert len(said) == 1
    assert not fence.is_open
    os.close(read_fd)
    os.close(write_fd)


def test_no_two_runs_have_the_same_token() -> None:
    said: list[str] = []
    for _ in range(2):
        with Fence(said.append, ()):
            pass
    assert len(set(said)) == 4
