"""The report and the page it is put into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soak import report
from soak.journal import Journal
from soak.part import Part

PART = Part(
    name="toy", about="a toy", things="toys", size=40, unit=2, run=lambda work: None,
    summary=lambda trials: {"good trials": len(trials)},
)
CROWD = Part(
    name="crowd", about="a crowd", things="VMs", size=20, at_once=True, run=lambda work: None,
)


def test_a_report_has_all_that_ran(tmp_path: Path) -> None:
    with Journal(tmp_path / "toy.jsonl") as journal:
        journal.add(report.this_leg(8))
        journal.add({"trial": 0, "s": 1800.0})
        journal.add({"trial": 1, "s": 1800.0, "failed": "so"})
        journal.add({**report.this_leg(6), "commit": "other"})
        journal.add({"trial": 2, "s": 3600.0})
        journal.add({"left": "a file"})
    found = report.report_of(PART, journal.path)
    assert found is not None
    assert (found["done"], found["asked"], found["hours"]) == (6, 8, 2.0)
    assert (found["failed"], found["failures"]) == (2, ["trial 1: so", "a file"])
    assert found["figures"] == {"good trials": 2}
    assert len(found["commits"]) == 2  # type: ignore[arg-type]
    report.write([found], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == [found]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `toy` | 6 toys | 2 | 2.0 |" in text
    assert "- FAILED: trial 1: so\n" in text


def test_a_part_that_has_not_run_is_not_in_it(tmp_path: Path) -> None:
    assert report.report_of(PART, tmp_path / "none") is None
    with Journal(tmp_path / "toy.jsonl") as journal:
        journal.add(report.this_leg(8))
    assert report.report_of(PART, journal.path) is None


def test_of_crowds_the_largest_counts(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl") as journal:
        for number in (3, 20, 10):
            journal.add({"trial": number, "s": 1.0})
    found = report.report_of(CROWD, journal.path)
    assert found is not None
    assert found["done"] == 20


def test_it_is_published_between_two_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.publish([], page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no"):
        report.publish([], page)
