"""How our init reads the kernel command line, by its own functions under busybox sh."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

INIT = Path(__file__).resolve().parents[2] / "pyvmm/linux/images/init"


def shell(script: str, *arguments: str) -> str:
    """What busybox sh prints for ``script`` with the functions of init defined."""
    command = ["busybox", "sh", "-eu", "-c", f'. "{INIT}"; {script}', "sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(cmdline: str) -> tuple[bool, str, list[str]]:
    """(whether there is a command, the command, the other words)"""
    out = shell('parse_cmdline "$1"; printf "%s\\n" "$HAS_RUN" "$RUN" "$OTHER"', cmdline)
    has_run, run, other = out.removesuffix("\n").split("\n")
    return has_run == "yes", run, other.split()


@pytest.mark.parametrize(("cmdline", "run", "other"), [
    # Without a double quote: to the end.
    ("pyvmm.run=exit 7", "exit 7", []),
    ("console=ttyS0 rw pyvmm.run=exit 7", "exit 7", ["console=ttyS0", "rw"]),
    ("pyvmm.run=ls -l /", "ls -l /", []),
    ('rw pyvmm.run=sh -c "exit 3"', 'sh -c "exit 3"', ["rw"]),
    ("pyvmm.run=echo 'a  b'; exit 2", "echo 'a  b'; exit 2", []),
    ("pyvmm.run=echo pyvmm.shell", "echo pyvmm.shell", []),
    ("pyvmm.run=true", "true", []),
    ("pyvmm.run=", "", []),
    # Quoted, in either place the kernel accepts: to the closing quote.
    ('rw pyvmm.run="exit 7" quiet', "exit 7", ["rw", "quiet"]),
    ('rw "pyvmm.run=exit 7" quiet', "exit 7", ["rw", "quiet"]),
    ('pyvmm.run="exit 7"', "exit 7", []),
    ('"pyvmm.run=exit 7"', "exit 7", []),
    ('pyvmm.run="" ro', "", ["ro"]),
    ('pyvmm.run="exit 7', "exit 7", []),
    ('pyvmm.run="a=$x; b=*" ro', "a=$x; b=*", ["ro"]),
    # The first one counts.
    ('pyvmm.run="exit 1" pyvmm.run=exit 2', "exit 1", ["pyvmm.run=exit", "2"]),
    ('pyvmm.run=echo "pyvmm.run=x"', 'echo "pyvmm.run=x"', []),
    ('"pyvmm.run=echo pyvmm.run=x" ro', "echo pyvmm.run=x", ["ro"]),
])
def test_where_the_command_ends(cmdline: str, run: str, other: list[str]) -> None:
    assert parse(cmdline) == (True, run, other)


@pytest.mark.parametrize("cmdline", [
    "", "console=ttyS0 root=/dev/vda rw", "xpyvmm.run=no", "pyvmm.runner=no", "pyvmm.shell"])
def test_no_command(cmdline: str) -> None:
    assert parse(cmdline) == (False, "", cmdline.split())


@pytest.mark.parametrize(("cmdline", "word", "found"), [
    ("rw pyvmm.shell", "pyvmm.shell", True),
    ("pyvmm.shell=1", "pyvmm.shell", False),
    ('pyvmm.run="true" pyvmm.shell', "pyvmm.shell", True),
    ("pyvmm.run=echo pyvmm.shell", "pyvmm.shell", False),
    ('pyvmm.run="mount -o ro x" rw', "ro", False),
    ("root=/dev/vda ro", "ro", True),
])
def test_words_count_only_outside_the_command(cmdline: str, word: str, found: bool) -> None:
    script = 'parse_cmdline "$1"; if has_word "$2"; then echo yes; else echo no; fi'
    assert shell(script, cmdline, word) == ("yes\n" if found else "no\n")


def test_nothing_runs_when_it_is_not_the_first_process() -> None:
    assert shell("") == ""


@pytest.mark.parametrize(("timing", "marked"), [("1", "mark 2\n"), ("", "")])
def test_a_stage_is_marked_only_when_times_are_taken(
    timing: str, marked: str, tmp_path: Path
) -> None:
    program = tmp_path / "pyvmm-mark"
    program.write_text('#!/bin/sh\necho "mark $1"\n')
    program.chmod(0o755)
    script = 'PATH=$1:$PATH timing=$2; mark 2; echo on'
    assert shell(script, str(tmp_path), timing) == f"{marked}on\n"


def test_the_first_line_is_the_one_the_host_watches_for() -> None:
    assert shell('say "user space reached (Linux x)"') == (
        "pyvmm-init: user space reached (Linux x)\n")


@pytest.mark.parametrize(("devices", "has_agent"), [
    ({}, False),
    ({"virtio0": ("0x0002", "0110"), "virtio1": ("0x0004", "0100")}, False),
    ({"virtio0": ("0x0003", "1010"), "virtio1": ("0x0002", "0100")}, False),  # hvc0
    ({"virtio0": ("0x0002", "0000"), "virtio1": ("0x0003", "0100")}, True),
    ({"virtio0": ("0x0003", "1010"), "virtio1": ("0x0003", "0100")}, True),
])
def test_an_agent_is_waited_for_where_there_is_a_port_for_it(
    tmp_path: Path, devices: dict[str, tuple[str, str]], has_agent: bool
) -> None:
    for name, (device, features) in devices.items():
        folder = tmp_path / "bus/virtio/devices" / name
        folder.mkdir(parents=True)
        (folder / "device").write_text(f"{device}\n")
        (folder / "features").write_text(features.ljust(64, "0") + "\n")
    out = shell('SYS=$1; start_agent; echo "${HAS_AGENT:-no}"', str(tmp_path))
    assert out == ("yes\n" if has_agent else "no\n")
