"""The report and the page it is put into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soak import report, results
from soak.journal import Journal
from soak.part import Part

PART = Part(
    name="toy", about="a toy", things="toys", size=40, unit=2, run=lambda work: None,
    summary=lambda trials: {"good trials": len(trials)},
)


def test_a_report_has_all_that_ran(tmp_path: Path) -> None:
    with Journal(tmp_path / "toy.jsonl") as journal:
        journal.add(report.this_leg(8))
        journal.add({"trial": 0, "s": 1800.0})
        journal.add({"trial": 1, "s": 1800.0, "failed": "so"})
        journal.add({**report.this_leg(6), "commit": "other"})
        journal.add({"trial": 2, "s": 3600.0})
        journal.add({"left": "a file"})
    found = results.report_of(PART, results.runs_of(PART, journal.path))
    assert found is not None
    assert (found["done"], found["asked"], found["hours"]) == (6, 8, 2.0)
    assert (found["failed"], found["failures"]) == (2, ["trial 1: so", "a file"])
    assert found["figures"] == {"good trials": 2}
    assert found["commits"] == [report.commit(), "other"]
    report.write([found], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == [found]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `toy` | 6 toys | 2 | 2.0 |" in text
    assert "- FAILED: trial 1: so\n" in text


def test_counts_of_kinds_and_many_commits_are_one_line(tmp_path: Path) -> None:
    with Journal(tmp_path / "toy.jsonl") as journal:
        for number in range(6):
            journal.add({**report.this_leg(8), "commit": f"c{number}", "leg": f"2026-12-0{number}"})
            journal.add({"trial": number, "s": 1.0})
    found = results.report_of(PART, results.runs_of(PART, journal.path))
    assert found is not None
    text = report.page([{**found, "figures": {"VMs": {"raw": 3, "nbd": 12}}}])
    assert "| 2026-12-00 to 2026-12-05 | 6, from c0 to c5 |" in text
    assert "- VMs: 12 nbd; 3 raw\n" in text


def test_a_part_that_has_not_run_is_not_in_it(tmp_path: Path) -> None:
    assert results.runs_of(PART, tmp_path / "none") == []
    with Journal(tmp_path / "toy.jsonl") as journal:
        journal.add(report.this_leg(8))
    assert results.report_of(PART, results.runs_of(PART, journal.path)) is None


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
