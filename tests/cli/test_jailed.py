"""``--jail``, ``--user`` and ``--cgroup``: mistakes, lines, and the order of the steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm.cli import restore, run
from pyvmm.cli.jailed import OFF, Jail
from pyvmm.cli.main import main
from pyvmm.errors import ConfigError, HostError
from pyvmm.jail import confine as confining
from pyvmm.jail import seccomp
from pyvmm.jail.confine import Confinement, Plan
from pyvmm.startup.options import parse_options


def options(*words: str) -> SimpleNamespace:
    return parse_options(run.COMMAND, ["--kernel", "k", *words])


class Host:
    """Stands in for the steps of the jail, which would be around all further tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[Plan] = []
        self.done = Confinement(in_force=("one", "two"), lacking=())
        self.reason = ""
        monkeypatch.setattr(confining, "confine", self._confine)
        monkeypatch.setattr(seccomp, "why_not", lambda: self.reason)
        monkeypatch.setattr("pyvmm.jail.namespaces.Namespaces", SimpleNamespace)
        monkeypatch.setattr("os.geteuid", lambda: 1000)

    def _confine(self, plan: Plan) -> Confinement:
        self.plans.append(plan)
        return self.done


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


@pytest.mark.parametrize(("words", "problem"), [
    (["--jail", "maybe"], "--jail maybe: is none of on, off, strict"),
    (["--jail", "off", "--user", "nobody"],
     "--user nobody: is a part of the jail, and --jail is off"),
    (["--jail", "off", "--cgroup", "/x"], "--cgroup /x: is a part of the jail, and --jail is off"),
    (["--user", "nobody-of-that-name"], "--user nobody-of-that-name: there is no user"),
])
def test_a_mistake_is_told_before_anything_is_given_up(
    host: Host, words: Sequence[str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        Jail(options(*words))
    assert host.plans == []


@pytest.mark.parametrize("words", [
    ["run", "--kernel", "/dev/null"], ["restore", "/none"],
])
def test_run_and_restore_know_the_options(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main([*words, "--jail", "maybe"]) == 125
    assert "--jail maybe: is none of" in capsys.readouterr().err
    names = {option.name for option in (*run.COMMAND.options, *restore.COMMAND.options)}
    assert {"--jail", "--user", "--cgroup"} <= names


def test_off_is_said_aloud_and_gives_nothing_up(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    jail = Jail(options("--jail", "off"))
    assert jail.enter({}) is None
    assert host.plans == []
    assert capsys.readouterr().err == f"pyvmm: {OFF}\n"


def test_on_is_silent(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert Jail(options()).enter({}) is seccomp.load
    assert capsys.readouterr().err == ""


def test_a_part_that_the_host_lacks_is_one_line(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.done = Confinement(in_force=(), lacking=("the jail lacks Landlock: why",))
    host.reason = "seccomp(2) is refused"
    assert Jail(options()).enter({}) is None
    first, second = capsys.readouterr().err.splitlines()
    assert first == "pyvmm: the jail lacks Landlock: why"
    assert second.startswith("pyvmm: the jail lacks filters of system calls: seccomp(2) is refused")


def test_strict_gives_nothing_up_if_there_are_no_filters(host: Host) -> None:
    host.reason = "seccomp(2) is refused"
    with pytest.raises(HostError, match=r"--jail strict: seccomp\(2\) is refused"):
        Jail(options("--jail", "strict")).enter({})
    assert host.plans == []


@pytest.mark.parametrize(("word", "is_strict"), [("on", False), ("strict", True)])
def test_the_plan_has_what_the_options_say(host: Host, word: str, is_strict: bool) -> None:
    Jail(options("--jail", word)).enter({7: "x"}, more_files=3)
    (plan,) = host.plans
    assert plan.strict is is_strict
    assert set(plan.kept) == {0, 1, 2, 7}
    assert plan.more_files == 3


def test_verbose_says_what_is_in_force_and_twice_what_is_open(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    Jail(options("-v")).enter({7: "a disk"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pyvmm: jail: one; two; ")
    Jail(options("-vv")).enter({7: "a disk", 1: "console output"})
    lines = capsys.readouterr().err.splitlines()
    assert lines[:4] == [
        "pyvmm: open: 0 standard input", "pyvmm: open: 1 console output",
        "pyvmm: open: 2 standard error", "pyvmm: open: 7 a disk",
    ]


@pytest.mark.parametrize(("make", "largest"), [
    (lambda path: os.open(path, os.O_RDWR), 4096), (lambda path: os.open(path, os.O_RDONLY), 0),
])
def test_no_file_becomes_longer_than_the_largest_that_can_be_written(
    host: Host, tmp_path: Path, make: Callable[[Path], int], largest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    monkeypatch.setattr("pyvmm.cli.jailed.STANDARD", {})
    fd = make(path)
    try:
        Jail(options()).enter({fd: "disk"})
        Jail(options()).enter({fd: "disk"}, may_grow=True)
        assert [plan.largest_file_bytes for plan in host.plans] == [largest, None]
    finally:
        os.close(fd)


def test_a_log_at_standard_output_may_grow(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    monkeypatch.setattr("pyvmm.cli.jailed.STANDARD", {fd: "standard output"})
    try:
        Jail(options()).enter({})
    finally:
        os.close(fd)
    assert host.plans[0].largest_file_bytes is None
