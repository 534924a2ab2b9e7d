"""The report: what ran, how much of it, and what it found, as JSON and as a page."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path

from soak.journal import Line
from soak.processes import ROOT
from soak.results import Report

BEGIN, END = "<!-- soak report: python -m soak --publish -->", "<!-- end of the soak report -->"
COLUMNS = 99
COMMIT = "PYVMM_SOAK_COMMIT"
_COMMITS_SHOWN = 4


def this_leg(size: int) -> Line:
    """Return the line that begins a stretch of work on ``size`` things, here and now."""
    return {
        "leg": _now(), "id": secrets.token_hex(6), "size": size, "commit": commit(),
        "host": platform.release(), "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)), "lab": bool(os.environ.get("PYVMM_LAB")),
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


def write(reports: Sequence[Report], out: Path) -> None:
    """Write ``report.json`` and ``report.md`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(reports, indent=1) + "\n")
    (out / "report.md").write_text(f"# Soak\n\n{page(reports)}")


def page(reports: Sequence[Report]) -> str:
    """Return the reports as Markdown: a table, then the figures of each part."""
    rows = ["| part | done | failed | VM hours | when | commits |", "|---|---|---|---|---|---|"]
    rows += [
        f"| `{one['part']}` | {one['done']} {one['things']} | {one['failed']} | {one['hours']} |"
        f" {_days(one)} | {_commits(one['commits'])} |"
        for one in reports
    ]
    return "\n".join([*rows, "", *(line for one in reports for line in _details(one))])


def _days(one: Report) -> str:
    first, last = one["from"][:10], one["to"][:10]
    return str(first if first == last else f"{first} to {last}")


def _commits(commits: Sequence[str]) -> str:
    if len(commits) <= _COMMITS_SHOWN:
        return ", ".join(commits)
    return f"{len(commits)}, from {commits[0]} to {commits[-1]}"


def _details(one: Report) -> list[str]:
    figures, failures, where = one["figures"], one["failures"], one["where"]
    lines = [*_wrapped(f"**{one['part']}**: {one['about']}. On {'; '.join(where)}."), ""]
    for name, value in figures.items():
        lines += _wrapped(f"- {name}: {_shown(value)}")
    lines += [f"- FAILED: {text}" for text in failures]
    return [*lines, ""] if figures or failures else lines


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{count} {kind}" for kind, count in sorted(value.items()))
    return str(value)


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
