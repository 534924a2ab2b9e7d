"""The page about a matrix, looked at in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pyvmm.cli.parse import parse_disk
from pyvmm.matrix.expand import runs_of
from pyvmm.matrix.page import MAX_CARDS, PageHead, page
from pyvmm.matrix.plan import read_plan
from pyvmm.matrix.results import RunResult, not_started
from pyvmm.matrix.runs import Run
from pyvmm.testing.timeline import PHASES, Phase
from tests.support import chromium

HOSTILE = "<script>alert(1)</script><img src=http://x/y.png>\x1b[31m\u202e&amp;\"'"
COLOURS = {"start": "#8b95a3", "kernel": "#3f78c9", "user space": "#2a9d8f", "agent": "#9a6fc0",
           "command": "#e09f3e"}
HEAD = PageHead(title=f"{HOSTILE}.toml", when="2026-11-30 03:00:11 UTC", seconds=32.5,
                where="4 at a time", exit_status=121)
MATRIX = """
memory = ["256M", "1G"]
cpus = [1, 2]
[kernels]
debian-6-1-0-37-cloud-amd64-with-a-name = "k"
mine = "k"
[disks]
root = "root.img"
[commands]
load-module = ["insmod"]
version = ["uname"]
"""


def phases(scale: float) -> tuple[Phase, ...]:
    """Return all phases, one behind the other."""
    lengths = (0.15, 0.8, 0.4, 0.1, 0.6)
    begins = [sum(lengths[:at]) * scale for at in range(6)]
    return tuple(
        Phase(name=name, begin_s=begins[at], end_s=begins[at + 1])
        for at, name in enumerate(PHASES)
    )


def results(runs: tuple[Run, ...]) -> list[RunResult]:
    """Return a result for each of ``runs``: a panic, a failure, one not run, the others well."""
    found = []
    for at, run in enumerate(runs):
        result = RunResult(
            name=run.name, verdict="passed", exit_status=0, phases=phases(1 + at / 10),
            seconds=2.05 * (1 + at / 10), logs=("console.log", "stdout.log"),
        )
        if at == 2:
            result = result.replace(
                verdict="panic", exit_status=121, message=f"kernel panic: {HOSTILE}",
                line=f"[    1.5] Kernel panic - not syncing: {HOSTILE}",
                before=tuple(f"[    1.{n:02}] {'x' * n} {HOSTILE}" for n in range(40)),
                parts=(("registers", ("rip 0x1",)),),
            )
        if at == 5:
            result = result.replace(
                verdict="failed", exit_status=3, message="insmod: exited with status 3",
                parts=(("standard error", ("y" * 400,)),), where="tcp://10.0.0.7:40001",
            )
        found.append(result if at != 7 else not_started(run.name))
    return found


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """Return a page with a bit of everything."""
    file = tmp_path / "m.toml"
    file.write_text(MATRIX)
    runs = runs_of(read_plan(str(file), parse_disk))
    path = tmp_path / "index.html"
    path.write_text(page(HEAD, runs, results(runs), "runs"), encoding="utf-8")
    return path


class Elements(HTMLParser):
    """The elements of a page that are open, and all addresses in it."""

    VOID = ("meta", "wbr", "rect", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element that begins."""
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element that has no end."""
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Note an element that ends."""
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(shown: Path) -> None:
    parsed = Elements()
    parsed.feed(shown.read_text())
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe"} & set(parsed.seen)
    assert all(re.match(r"\./runs/|#run-", address) for address in parsed.addresses)
    assert "url(" not in shown.read_text()


def test_failed_runs_come_first_with_the_line_and_the_lines_before_it(shown: Path) -> None:
    text = shown.read_text()
    assert re.findall(r'<section class="card" id="run-([^"]*)"', text) == [
        "debian-6-1-0-37-cloud-amd64-with-a-name+root+256M+2cpu+load-module",
        "debian-6-1-0-37-cloud-amd64-with-a-name+root+1G+1cpu+version",
    ]
    assert text.index('class="card"') < text.index("All runs")
    assert "Kernel panic - not syncing: &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("[    1.") == 41
    assert r"\x1b[31m\u202e" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("flags", [(), (chromium.DARK,)], ids=["light", "dark"])
def test_chromium_shows_the_table_and_the_timelines(shown: Path, flags: tuple[str, ...]) -> None:
    found = chromium.measured(shown, 1200, *flags)
    assert found["rows"] == "16"
    # 15 runs in the table and 2 cards, 5 phases each; a mark at the end of each that failed.
    assert int(found["bars"]) == 15 * 5 + 2 * 5 + 2 * 2
    assert found["window"] == "1200"
    assert int(found["wide"]) <= 1200
    assert found["back"] == ("rgb(20, 23, 27)" if flags else "rgb(246, 247, 249)")


def test_a_phone_need_not_scroll_sideways(shown: Path) -> None:
    found = chromium.measured(shown, 390)
    assert found["window"] == "390"
    assert int(found["wide"]) <= 390
    assert found["rows"] == "16"


def test_a_screenshot_has_the_colours_of_all_phases_and_the_console_is_quiet(
    shown: Path, tmp_path: Path
) -> None:
    for width in (1200, 390):
        picture = tmp_path / f"{width}.png"
        assert chromium.screenshot(shown, picture, width, 2600) == []
        image = Image.open(picture).convert("RGB")
        assert image.width == width
        counts = {colour: count for count, colour in image.getcolors(1 << 24) or ()}
        for name, colour in COLOURS.items():
            rgb = tuple(bytes.fromhex(colour[1:]))
            assert counts.get(rgb, 0) > 200, f"{name} at {width}"


def test_a_page_with_very_many_failures_stays_bounded(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text(MATRIX)
    run = runs_of(read_plan(str(file), parse_disk))[0]
    runs = [run.replace(name=f"r{number}") for number in range(1000)]
    bad = [
        RunResult(name=one.name, verdict="panic", exit_status=121, line="x" * 400,
                  before=("y" * 400,) * 40)
        for one in runs
    ]
    text = page(HEAD, runs, bad, "runs")
    assert text.count('class="card"') == MAX_CARDS
    assert f"{1000 - MAX_CARDS} more failed runs are in the table" in text
    assert len(text) < 8 << 20
