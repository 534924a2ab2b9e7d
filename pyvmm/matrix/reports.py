"""Write the reports of a matrix that is over: the page, the JUnit file, the summary."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from pyvmm.matrix.output import JUNIT, PAGE, RUNS, Output
from pyvmm.matrix.page import PageHead, page
from pyvmm.matrix.results import HOST_ERROR, RunResult, badness
from pyvmm.matrix.runs import Run
from pyvmm.startup.types import Record
from pyvmm.testing.junit import Case, Suite, junit_xml

MAX_NAMED = 20
"""Failed runs that the last lines name."""


class Report(Record):
    """A matrix that is over.  ``began_s`` is a Unix time, ``note`` says why it is not complete."""

    file: str
    runs: Sequence[Run]
    results: Sequence[RunResult]
    exit_status: int
    began_s: float
    seconds: float
    where: str
    note: str = ""


def write_reports(report: Report, output: Output, *, junit: str, html: str) -> None:
    """Write all reports; ``junit`` and ``html`` are other places for two of them, or ""."""
    page_path = os.path.abspath(html or os.path.join(output.path, PAGE))
    logs = os.path.relpath(os.path.join(output.path, RUNS), os.path.dirname(page_path))
    head = PageHead(
        title=os.path.basename(report.file),
        when=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report.began_s)),
        seconds=report.seconds, where=report.where, exit_status=report.exit_status,
        note=report.note,
    )
    output.write(page_path, page(head, report.runs, report.results, logs).encode())
    junit_path = os.path.abspath(junit or os.path.join(output.path, JUNIT))
    output.write(junit_path, junit_xml([_suite(report)]).encode())
    output.save_summary(report.results, report.exit_status)


def last_lines(report: Report, output: Output, html: str) -> Iterator[str]:
    """Yield the lines that end the command's output: the failed runs, the counts, the page."""
    bad = sorted(
        (one for one in report.results if not one.is_ok and one.is_done), key=badness
    )
    for one in bad[:MAX_NAMED]:
        message = f": {one.message}" if one.message else ""
        yield f"FAIL {one.name}: {one.verdict} ({one.exit_status}){message}"
    if len(bad) > MAX_NAMED:
        yield f"FAIL and {len(bad) - MAX_NAMED} more"
    if report.note:
        yield report.note
    counts = Counter(one.verdict for one in sorted(report.results, key=badness, reverse=True))
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    runs = "1 run" if len(report.results) == 1 else f"{len(report.results)} runs"
    yield f"{runs} in {report.seconds:.1f} s: {told}; {html or os.path.join(output.path, PAGE)}"


def _suite(report: Report) -> Suite:
    return Suite(
        name=os.path.basename(report.file),
        cases=[_case(result) for result in report.results],
        began_s=report.began_s,
        properties=[("where", report.where), ("exit-status", str(report.exit_status))],
    )


def _case(result: RunResult) -> Case:
    if result.test is not None:
        return result.test.as_case("pyvmm.matrix")
    case = Case(name=result.name, classname="pyvmm.matrix", seconds=result.seconds)
    if result.is_ok:
        return case
    if not result.is_done:
        return case.replace(skipped=result.message)
    told = (result.verdict, result.message, "\n".join([*result.before, result.line]).strip("\n"))
    return case.replace(error=told) if result.verdict == HOST_ERROR else case.replace(failure=told)
