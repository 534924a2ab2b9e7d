"""The report: what ran, how much of it, and what it found, as JSON and as a page."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from soak.journal import Line, read_lines
from soak.part import Part
from soak.processes import ROOT

Report = dict[str, object]
BEGIN, END = "<!-- soak report: python -m soak --publish -->", "<!-- end of the soak report -->"
COLUMNS = 99
COMMIT = "PYVMM_SOAK_COMMIT"
_FAILURES_SHOWN = 20


def this_leg(size: int) -> Line:
    """Return the line that begins a stretch of work on ``size`` things, here and now."""
    return {
        "leg": _now(), "size": size, "commit": commit(), "host": platform.release(),
        "python": platform.python_version(), "cpus": len(os.sched_getaffinity(0)),
        "lab": bool(os.environ.get("PYVMM_LAB")),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")


def commit() -> str:
    """Return the checkout's commit; the lab, where git takes long, is told it."""
    if told := os.environ.get(COMMIT):
        return told
    found = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    )
    return found.stdout.strip() or "unknown"


def report_of(part: Part, journal: Path) -> Report | None:
    """Return the report on ``part``; None if it has never run."""
    lines = list(read_lines(journal))
    trials = [line for line in lines if "trial" in line]
    legs = [line for line in lines if "leg" in line]
    if not trials:
        return None
    failed = [f"trial {line['trial']}: {line['failed']}" for line in trials if "failed" in line]
    left = [line["left"] for line in lines if "left" in line]
    good = [line for line in trials if "failed" not in line]
    return {
        "part": part.name, "about": part.about, "things": part.things,
        "done": part.things_done(trials),
        "asked": max((line["size"] for line in legs), default=0),
        "failed": len(failed) + len(left), "failures": [*failed[:_FAILURES_SHOWN], *left],
        "hours": round(sum(line["s"] for line in trials) / 3600, 2),
        "stretches": len(legs),
        "commits": sorted({line["commit"] for line in legs}),
        "from": legs[0]["leg"] if legs else "",
        "where": sorted({_where(line) for line in legs}),
        "figures": dict(part.summary(good)),
    }


def _where(leg: Mapping[str, object]) -> str:
    place = "the lab" if leg["lab"] else "this host"
    return f"{place}, Linux {leg['host']}, {leg['cpus']} CPUs, Python {leg['python']}"


def write(reports: Sequence[Report], out: Path) -> None:
    """Write ``report.json`` and ``report.md`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(reports, indent=1) + "\n")
    (out / "report.md").write_text(f"# Soak\n\n{page(reports)}")


def page(reports: Sequence[Report]) -> str:
    """Return the reports as Markdown: a table, then the figures of each part."""
    rows = ["| part | done | failed | VM hours | date | commit |", "|---|---|---|---|---|---|"]
    for one in reports:
        commits = one["commits"]
        assert isinstance(commits, list)
        rows.append(
            f"| `{one['part']}` | {one['done']} {one['things']} | {one['failed']} |"
            f" {one['hours']} | {str(one['from'])[:10]} | {', '.join(commits)} |"
        )
    return "\n".join([*rows, "", *(line for one in reports for line in _details(one))])


def _details(one: Report) -> list[str]:
    figures, failures, where = one["figures"], one["failures"], one["where"]
    assert isinstance(figures, dict)
    assert isinstance(failures, list)
    assert isinstance(where, list)
    lines = [*_wrapped(f"**{one['part']}**: {one['about']}. On {'; '.join(where)}."), ""]
    for name, value in figures.items():
        lines += _wrapped(f"- {name}: {value}")
    lines += [f"- FAILED: {text}" for text in failures]
    return [*lines, ""] if figures or failures else lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, subsequent_indent="  " if text.startswith("- ") else "",
        break_long_words=False, break_on_hyphens=False,
    )


def publish(reports: Sequence[Report], path: Path) -> None:
    """Put the page between the two marks of the file ``path``; ValueError without these."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: has no {BEGIN} and {END} behind it")
    path.write_text(f"{before}{begin}\n\n{page(reports)}\n{end}{after}")
