"""The file of results that outlives machines: nothing is counted twice, nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from soak import report, results
from soak.journal import Journal
from soak.part import Figures, Part

PART = Part(
    name="toy", about="a toy", things="toys", size=40, run=lambda work: None,
    summary=lambda trials: {
        "all": len(trials), "kinds": {"odd": sum(line["trial"] % 2 for line in trials)},
        "longest": f"{len(trials)} in a row",
    },
)
CROWD = Part(
    name="crowd", about="a crowd", things="VMs", size=20, at_once=True, run=lambda work: None,
    summary=lambda trials: {"acked": sum(line["trial"] for line in trials)},
)


def stretch(journal: Journal, *trials: int, **changes: object) -> None:
    journal.add({**report.this_leg(8), **changes})
    for number in trials:
        journal.add({"trial": number, "s": 36.0})


def total(part: Part, path: Path) -> Mapping[str, object]:
    found = results.report_of(part, results.read(path))
    assert found is not None
    return found


def test_a_run_that_is_published_again_takes_its_own_place(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    with Journal(tmp_path / "toy.jsonl") as journal:
        stretch(journal, 0, 1)
        results.add(results.runs_of(PART, journal.path), kept)
        journal.add({"trial": 2, "s": 36.0})
        stretch(journal, 3)
    for _ in range(2):
        results.add(results.runs_of(PART, journal.path), kept)
        found = total(PART, kept)
        assert (found["done"], found["hours"], found["stretches"]) == (4, 0.04, 2)
        assert found["figures"] == {"all": 4, "kinds": {"odd": 2}, "longest": "3 in a row"}
    assert results.trials_of(results.read(kept), "toy") == {0, 1, 2, 3}
    assert results.trials_of(results.read(kept), "other") == set()


def test_runs_of_several_machines_add_up(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    for number, trials in enumerate(((0, 1, 2), (3, 4, 5, 6), (7,))):
        with Journal(tmp_path / f"{number}.jsonl") as journal:
            stretch(journal, *trials, leg=f"2026-12-0{number + 1} 10:00", commit=f"c{number}")
        results.add(results.runs_of(PART, journal.path), kept)
    found = total(PART, kept)
    assert found["done"] == 8
    assert (found["from"], found["to"]) == ("2026-12-01 10:00", "2026-12-03 10:00")
    assert found["commits"] == ["c0", "c1", "c2"]
    assert found["figures"] == {"all": 8, "kinds": {"odd": 4}, "longest": "4 in a row"}


def test_of_crowds_the_largest_counts(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    for number in (3, 20, 10):
        with Journal(tmp_path / f"{number}.jsonl") as journal:
            stretch(journal, number)
        results.add(results.runs_of(CROWD, journal.path), kept)
    found = total(CROWD, kept)
    assert (found["done"], found["figures"]) == (20, {"acked": 20})


def test_a_failure_is_kept_though_no_trial_ended_well(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    with Journal(tmp_path / "crowd.jsonl") as journal:
        stretch(journal)
        journal.add({"left": "a file"})
        stretch(journal)
        journal.add({"trial": 20, "s": 1.0, "failed": "so"})
        stretch(journal)
    results.add(results.runs_of(CROWD, journal.path), kept)
    found = total(CROWD, kept)
    assert (found["failed"], found["failures"]) == (2, ["a file", "trial 20: so"])
    assert found["stretches"] == 2, "of the third nothing is known"


@pytest.mark.parametrize(("trials", "text"), [
    ([], ""), ([7], "7"), ([0, 1, 2], "0-2"), ([9, 3, 1, 2, 9, 11], "1-3 9 11"),
])
def test_numbers_of_trials_are_written_in_few_words(trials: list[int], text: str) -> None:
    assert results.spans(trials) == text
    assert results.numbers(text) == sorted({*trials})


def test_figures_of_which_some_are_missing_add_up() -> None:
    figures: list[Figures] = [{"a": 1}, {"b": {"x": 2}}, {"a": 2, "b": {"y": 1}, "c": "text"}]
    assert results.total(figures) == {"a": 3, "b": {"x": 2, "y": 1}, "c": "text"}
