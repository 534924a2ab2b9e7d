"""One HTML page about a matrix: no script, no other file, nothing from the network."""

from __future__ import annotations

import html
import os
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence

from pyvmm.matrix.page_style import STYLE
from pyvmm.matrix.results import NOT_STARTED, RunResult, badness
from pyvmm.matrix.runs import AXES, Run
from pyvmm.matrix.timeline import legend, picture, ruler, scale_of, words
from pyvmm.report import escape
from pyvmm.startup.types import Record
from pyvmm.testing.own_verdicts import PASSED

MAX_CARDS = 200
"""The most failed runs of which the page quotes the console."""
OPEN_CARDS = 5
"""Of so many the console is shown at once, of the others after a click."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class PageHead(Record):
    """The circumstances of a matrix: its file, when it began, how long it took, where it ran."""

    title: str
    when: str
    seconds: float
    where: str
    exit_status: int
    note: str = ""


def page(
    head: PageHead, runs: Sequence[Run], results: Sequence[RunResult], logs: str
) -> str:
    """Return the page.  ``logs`` is the directory of the runs' logs, relative to the page."""
    scale_s = scale_of(results)
    bad = sorted((one for one in results if not one.is_ok and one.is_done), key=badness)
    return "\n".join((
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_text(_summary(results))} - {_text(head.title)}</title>",
        f"<style>{STYLE}</style>", "</head>", "<body>", *_header(head, results),
        *(part for at, one in enumerate(bad[:MAX_CARDS])
          for part in _card(one, scale_s, logs, at < OPEN_CARDS)),
        *([f"<p>{len(bad) - MAX_CARDS} more failed runs are in the table.</p>"]
          if len(bad) > MAX_CARDS else []),
        *_table(runs, results, scale_s, logs), "</body>", "</html>", "",
    ))


def _summary(results: Sequence[RunResult]) -> str:
    """Return the counts in words: the ones that matter first."""
    bad = sum(not one.is_ok for one in results)
    count = len(results)
    return f"{bad} of {count} runs did not pass" if bad else f"all {count} runs passed"


def _header(head: PageHead, results: Sequence[RunResult]) -> Iterator[str]:
    counts = Counter(one.verdict for one in sorted(results, key=badness))
    state = "good" if all(one.is_ok for one in results) else "bad"
    yield f'<header class="{state}">'
    yield f"<h1>{_text(_summary(results))}</h1>"
    yield '<p class="chips">' + " ".join(
        f'<span class="chip {_state(verdict)}">{count} {_text(verdict)}</span>'
        for verdict, count in counts.items()
    ) + "</p>"
    yield (
        f'<p class="facts"><b>{_text(head.title)}</b> &middot; {_text(head.when)} &middot; '
        f"{head.seconds:.1f} s &middot; {_text(head.where)} &middot; "
        f"exit status {head.exit_status}</p>"
    )
    if head.note:
        yield f'<p class="note">{_text(head.note)}</p>'
    yield f'<p class="legend">{legend()}</p>'
    yield "</header>"


def _quoted(title: str, lines: Sequence[str], is_open: bool) -> str:
    """Return the lines of a console behind a title that opens and closes them."""
    text = "".join(f"{_text(line)}\n" for line in lines)
    return (
        f"<details{' open' if is_open else ''}><summary>{_text(title)}</summary>"
        f'<pre class="console">{text}</pre></details>'
    )


def _card(result: RunResult, scale_s: float, logs: str, is_open: bool) -> Iterator[str]:
    """Yield the part about a run that failed."""
    yield f'<section class="card" id="run-{_text(result.name)}">'
    yield (
        f'<h2><span class="chip bad">{_text(result.verdict)}</span> '
        f"<span class=\"name\">{_breakable(result.name)}</span></h2>"
    )
    if result.message and result.message != result.line:
        yield f'<p class="message">{_text(result.message)}</p>'
    yield picture(result, scale_s)
    yield f'<p class="facts">{_text(words(result))} &middot; exit status {result.exit_status}'
    yield f"{_where(result)}{_links(result, logs)}</p>"
    if result.line:
        yield f'<pre class="console"><mark>{_text(result.line)}</mark></pre>'
    parts = [("the lines before it", result.before), *result.parts]
    for at, (title, lines) in enumerate(part for part in parts if part[1]):
        yield _quoted(title, lines, is_open and not at)
    for problem in result.problems:
        yield f'<p class="note">{_text(problem)}</p>'
    yield "</section>"


def _table(
    runs: Sequence[Run], results: Sequence[RunResult], scale_s: float, logs: str
) -> Iterator[str]:
    """Yield the table of all runs, the worst first."""
    places = {run.name: run.places for run in runs}
    shown = [at for at in range(len(AXES)) if any(run.places[at] for run in runs)]
    heads = "".join(f"<th>{AXES[at]}</th>" for at in shown)
    yield '<section class="all"><h2>All runs</h2><table><thead>'
    yield f'<tr><th>verdict</th>{heads}<th class="number">seconds</th>'
    yield f'<th class="time">{ruler(scale_s)}</th><th>logs</th></tr></thead><tbody>'
    for result in sorted(results, key=badness):
        cells = "".join(
            f'<td data-head="{AXES[at]}">{_breakable(places[result.name][at])}</td>'
            for at in shown
        )
        verdict = f'<span class="chip {_state(result.verdict)}">{_text(result.verdict)}</span>'
        if not result.is_ok and result.is_done:
            verdict = f'<a href="#run-{urllib.parse.quote(result.name)}">{verdict}</a>'
        seconds = f"{result.seconds:.2f}" if result.seconds else ""
        yield (
            f'<tr class="{_state(result.verdict)}"><td class="verdict">{verdict}</td>{cells}'
            f'<td class="number" data-head="seconds">{seconds}</td>'
            f'<td class="time">{picture(result, scale_s)}</td>'
            f'<td class="logs">{_links(result, logs).removeprefix(" &middot; ")}</td></tr>'
        )
    yield "</tbody></table></section>"


def _links(result: RunResult, logs: str) -> str:
    """Return links to the run's logs, which work while the page stands beside them."""
    return "".join(
        f' &middot; <a href="{html.escape(_url(os.path.join(logs, result.name, log)))}">'
        f"{_text(log.removesuffix('.log'))}</a>"
        for log in result.logs
    )


def _url(path: str) -> str:
    """Return ``path``, relative or absolute, as a URL."""
    quoted = urllib.parse.quote(path)
    return f"file://{quoted}" if path.startswith("/") else f"./{quoted}"


def _where(result: RunResult) -> str:
    return f" &middot; {_text(result.where)}" if result.where else ""


def _state(verdict: str) -> str:
    return {PASSED: "good", NOT_STARTED: "idle"}.get(verdict, "bad")


def _breakable(name: str) -> str:
    """Return a run's name as HTML that may be broken between its parts."""
    return _text(name).replace("+", "+<wbr>")


def _text(text: str) -> str:
    return html.escape(escape(text))
