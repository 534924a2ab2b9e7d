"""What every test may take for granted."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.support import slow
from tests.support.patience import patient

# A shell's background job starts with these ignored, and so does one under nohup.  pyvmm leaves
# ignored what was: the tests that send one would wait for ever (`make test &`, some CI runners).
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

pytest_plugins = ("pytester",)

REPORT = "PYVMM_TEST_REPORT"
"""The environment variable that names the file from which ``make test`` makes its last lines."""
SHOWN = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--part N/M``: every M-th test, from the N-th on, of those that are selected."""
    parser.addoption("--part", metavar="N/M", default="1/1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the part that ``--part`` asks for."""
    part, parts = map(int, config.getoption("part").split("/"))
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--part {part}/{parts}: from 1/{parts} to {parts}/{parts}")
    kept = items[part - 1 :: parts]
    if parts > 1:
        dropped = [item for index, item in enumerate(items) if index % parts != part - 1]
        config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    """Give tests, whose own deadlines are ``patient``, time enough to miss one and say so."""
    limit = config.getini("timeout")
    if limit and config.getoption("timeout") is None and "PYTEST_TIMEOUT" not in os.environ:
        config.option.timeout = 2 * patient(float(limit))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that tests/slow.txt lists, which ``make check`` leaves out."""
    if slow.function_of(item.nodeid) in slow.listed():
        item.add_marker(pytest.mark.slow)


def _measure(reports: list[pytest.TestReport]) -> None:
    """Write tests/slow.txt anew from how long the tests of ``reports`` took."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[slow.function_of(report.nodeid)] += report.duration  # type: ignore[assignment]
    slow.write_list(seconds)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Leave to ``make test`` how many tests passed, and which did not."""
    if os.environ.get(slow.MEASURE):
        _measure([found for group in terminalreporter.stats.values() for found in group
                  if isinstance(found, pytest.TestReport)])
    path = os.environ.get(REPORT)
    if not path:
        return
    stats = terminalreporter.stats
    bad = [f"{kind.upper()} {found.nodeid}" for kind in ("failed", "error")
           for found in stats.get(kind, [])]
    counts = [f"{len(stats[kind])} {kind}" for kind in ("passed", "failed", "error", "skipped")
              if stats.get(kind)]
    more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    with Path(path).open("a", encoding="utf-8") as report:
        for line in (", ".join(counts) or "no tests", *bad[:SHOWN], *more):
            report.write(f"{line}\n")
