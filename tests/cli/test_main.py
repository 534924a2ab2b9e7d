"""The command line as a newcomer meets it: usage, mistakes, one line each, status 125."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pyvmm
from pyvmm.cli.main import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyvmm {pyvmm.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in ("run", "restore", "doctor", "lab"))


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 125
    assert capsys.readouterr().err.startswith("usage: pyvmm COMMAND")


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["boot"]) == 125
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "boot: no such command" in err


@pytest.mark.parametrize("command", ["run", "restore", "doctor", "lab"])
def test_each_command_has_help(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", command, "--help"], capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: pyvmm {command}")
    assert done.stderr == ""
