"""The pages: every link leads somewhere, and the tour is as long as it says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.cli import (
    ctl,
    doctor,
    export,
    image,
    kernel,
    lab,
    matrix,
    ps,
    restore,
    run,
    snapshot,
    test,
)
from pyvmm.startup.options import parse_options

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "tour.md"
PAGES = sorted([
    *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("[a-z]*/README.md"),
    *(ROOT / "guest").rglob("*.md"),
])
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
_STOP = re.compile(r"^(\d+)\. \[[^]]*\]\(\.\./(pyvmm/[^)]+\.py)\): ", re.MULTILINE)


def prose(page: Path) -> str:
    """The text of ``page`` without what is quoted in it: code is not searched for links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "x", text)


def anchors(page: Path) -> Iterator[str]:
    """The anchors of the headings of ``page``, as forges make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def broken(page: Path, root: Path = ROOT) -> Iterator[str]:
    """The links of ``page`` that lead nowhere in ``root``."""
    for target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue  # the network's
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        is_there = path.exists() and path.is_relative_to(root)
        if not is_there or (anchor and anchor not in anchors(path)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_every_page_is_in_the_index() -> None:
    linked = set(_LINK.findall((ROOT / "docs" / "index.md").read_text()))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= linked


def test_the_tour_is_as_long_as_it_says() -> None:
    text = TOUR.read_text()
    match = re.search(r"These (\d+) files, some ([\d,]+) lines", text)
    assert match
    files = [ROOT / name for _, name in _STOP.findall(text)]
    assert [int(number) for number, _ in _STOP.findall(text)] == list(range(1, len(files) + 1))
    assert len(files) == len(set(files)) == int(match[1])
    lines = sum(len(path.read_text().splitlines()) for path in files)
    said = int(match[2].replace(",", ""))
    assert abs(lines - said) <= said / 10, f"{lines} lines now"


def test_the_tour_passes_every_room() -> None:
    """Or has a paragraph at its door."""
    text = TOUR.read_text()
    rooms = {path.parent.name for path in (ROOT / "pyvmm").glob("*/__init__.py")}
    doors = set(re.findall(r"^\*\*\[[^]]+\]\(\.\./pyvmm/(\w+)\)\*\*", text, re.MULTILINE))
    assert rooms == doors


@pytest.mark.parametrize(("text", "found"), [
    ("[a](nowhere.md)", ["nowhere.md"]), ("[a](../x)", ["../x"]), ("[a](#two)", ["#two"]),
    ("[a](p.md#no-such)", ["p.md#no-such"]), ("`[a](x)` [b](#one-more) [c](p.md) [d](q)", []),
])
def test_a_broken_link_is_found(text: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    page = tmp_path / "p.md"
    page.write_text(f"# One, more\n{text}\n")
    assert list(broken(page, tmp_path)) == found


TABLES = {table.name: table for table in (
    run.COMMAND, export.COMMAND, doctor.COMMAND, kernel.COMMAND, lab.COMMAND, test.COMMAND,
    matrix.COMMAND, ps.COMMAND, ctl.COMMAND.replace(name="ctl"), image.COMMAND, snapshot.COMMAND,
    restore.COMMAND,
)}
HELP = "\n".join(table.epilog for table in TABLES.values()).replace("\n  pyvmm", "\n$ pyvmm")
TEXTS = {"help": HELP, **{str(page.relative_to(ROOT)): page.read_text() for page in PAGES}}
_SHOWN = re.compile(r"^\$ pyvmm ((?:'[^']*'|\\\n|[^'\n#])*)(?:#.*)?$", re.MULTILINE)
_COMMANDS = {name: _SHOWN.findall(text) for name, text in TEXTS.items()}


def arguments(line: str) -> list[str]:
    """The words of the first command in ``line``."""
    lexer = shlex.shlex(
        re.sub(r"\$\([^)]*\)", "x", line.replace("\\\n", " ")), posix=True, punctuation_chars=True
    )
    lexer.whitespace_split = True
    words = list(lexer)
    return words[: next((at for at, word in enumerate(words) if word[0] in ";&|>"), None)]


@pytest.mark.parametrize("name", [name for name, found in _COMMANDS.items() if found])
def test_fault_39_every_command_that_is_shown_is_well_formed(name: str) -> None:
    for line in _COMMANDS[name]:
        command, *rest = arguments(line)
        # The socket stands before the verb.
        parse_options(TABLES[command], rest[1:] if command == "ctl" else rest)
