"""The results that outlive a machine: ``docs/reliability.json``, a run a line, and their totals.

A run is what one process did of a part: a stretch of a journal, under a name that no other has.  A
run that is added again takes the place of its older self, so nothing is ever counted twice.  A soak
on another machine goes on behind the trials that are in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from soak.journal import Line, read_lines
from soak.part import Figures, Part
from soak.processes import ROOT

RESULTS = ROOT / "docs" / "reliability.json"
FAILURES_KEPT = 20

Run = dict[str, Any]
Report = dict[str, Any]


def runs_of(part: Part, journal: Path) -> list[Run]:
    """Return the runs of ``part`` in the file ``journal`` in which something happened."""
    stretches: list[list[Line]] = []
    for line in read_lines(journal):
        if "leg" in line:
            stretches.append([line])
        elif "trial" in line or "left" in line:
            stretches[-1].append(line)
    return [_run(part, leg, lines) for leg, *lines in stretches if lines]


def _run(part: Part, leg: Line, lines: Sequence[Line]) -> Run:
    trials = [line for line in lines if "trial" in line]
    good = [line for line in trials if "failed" not in line]
    failures = [f"trial {line['trial']}: {line['failed']}" for line in trials if "failed" in line]
    failures += [line["left"] for line in lines if "left" in line]
    place = "the lab" if leg["lab"] else "this host"
    return {
        "id": leg["id"], "part": part.name, "date": leg["leg"], "commit": leg["commit"],
        "where": f"{place}, Linux {leg['host']}, {leg['cpus']} CPUs, Python {leg['python']}",
        "asked": leg["size"], "done": part.things_done(trials), "failed": len(failures),
        "hours": round(sum(line["s"] for line in trials) / 3600, 4),
        "trials": spans(line["trial"] for line in trials),
        "figures": dict(part.summary(good)) if good else {},
        "failures": failures[:FAILURES_KEPT],
    }


def read(path: Path) -> list[Run]:
    """Return the runs in the file ``path``; none if it is not there."""
    found: list[Run] = json.loads(path.read_text()) if path.exists() else []
    return found


def add(runs: Iterable[Run], path: Path) -> list[Run]:
    """Add ``runs`` to the file ``path``, or put them in the place of older selves; return all."""
    known = {run["id"]: run for run in [*read(path), *runs]}
    found = sorted(known.values(), key=lambda run: (run["part"], run["date"]))
    path.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    return found


def trials_of(runs: Iterable[Run], part: str) -> frozenset[int]:
    """Return the numbers of the trials of ``part`` that ``runs`` have done."""
    mine = (run["trials"] for run in runs if run["part"] == part)
    return frozenset(number for text in mine for number in numbers(text))


def spans(trials: Iterable[int]) -> str:
    """Return whole numbers in few words: ``0-59 61``."""
    found = sorted({*trials})
    if not found:
        return ""
    breaks = [(one, other) for one, other in pairwise(found) if other != one + 1]
    firsts = [found[0], *(other for _, other in breaks)]
    lasts = [*(one for one, _ in breaks), found[-1]]
    return " ".join(
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(firsts, lasts, strict=True)
    )


def numbers(text: str) -> list[int]:
    """Return the numbers of which ``text`` are the ``spans``."""
    ends = [word.partition("-") for word in text.split()]
    return [
        number for first, _, last in ends for number in range(int(first), int(last or first) + 1)
    ]


def report_of(part: Part, runs: Sequence[Run]) -> Report | None:
    """Return the report on those of ``runs`` that are of ``part``; None if there are none.

    Of parts ``at_once`` the largest run alone gives the figures.
    """
    mine = sorted(
        (run for run in runs if run["part"] == part.name), key=lambda run: str(run["date"])
    )
    if not mine:
        return None
    largest = max(mine, key=lambda run: (run["done"], run["date"]))
    done = largest["done"] if part.at_once else sum(run["done"] for run in mine)
    return {
        "part": part.name, "about": part.about, "things": part.things, "done": done,
        "asked": max(run["asked"] for run in mine),
        "failed": sum(run["failed"] for run in mine),
        "failures": [text for run in mine for text in run["failures"]][-FAILURES_KEPT:],
        "hours": round(sum(run["hours"] for run in mine), 2),
        "stretches": len(mine), "commits": [*dict.fromkeys(run["commit"] for run in mine)],
        "from": mine[0]["date"], "to": mine[-1]["date"],
        "where": sorted({run["where"] for run in mine}),
        "figures": largest["figures"] if part.at_once else total(
            [run["figures"] for run in (*(run for run in mine if run is not largest), largest)]
        ),
    }


def total(figures: Sequence[Figures]) -> Figures:
    """Return the total of the figures of some runs, of which the last one is the largest.

    Numbers are added, counts of kinds as well.  A text is no sum: the largest run's is taken.
    """
    found: Figures = {}
    for name, value in (pair for one in figures for pair in one.items()):
        before = found.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            found[name] = {
                kind: before.get(kind, 0) + value.get(kind, 0) for kind in {**before, **value}
            }
        elif isinstance(value, int | float) and isinstance(before, int | float):
            found[name] = before + value
        else:
            found[name] = value
    return found
