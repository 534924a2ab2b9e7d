"""docs/ci.md and docs/coming-from.md: the scripts' lengths, and options that exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from pyvmm.cli import matrix, run, test
from pyvmm.startup.commands import Command

ROOT = Path(__file__).resolve().parents[2]
COMPARE = ROOT / "examples" / "ci-boot-test" / "compare"
CI = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
COMING_FROM = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")


def test_the_lengths_of_the_scripts_are_told() -> None:
    lines_of = runpy.run_path(str(COMPARE / "compare.py"))["lines_of"]
    row = next(line for line in CI.splitlines() if line.startswith("| lines of the script"))
    told = [int(cell) for cell in re.findall(r"\d+", row)]
    assert told == [lines_of(COMPARE / f"{tool}.sh") for tool in ("pyvmm", "virtme-ng", "qemu")]


@pytest.mark.parametrize("command", [matrix.COMMAND, run.COMMAND, test.COMMAND],
                         ids=["matrix", "run", "test"])
def test_the_options_that_are_shown_exist(command: Command) -> None:
    known = {f"--{option.name.lstrip('-')}" for option in command.options}
    shown = re.findall(rf"pyvmm {command.name} ([^`\n]*)", CI + COMING_FROM)
    assert shown
    ours = [line.partition(" -- ")[0] for line in shown]
    assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", "\n".join(ours))) - known == set()
