"""Parts of the soak that are tests with an environment variable for their length."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

from soak.errors import TrialError
from soak.part import Figures, Part, Trial, Work
from soak.processes import ROOT

_TAIL = 4000
_PRINTED = re.compile(r"^(?!=|\d+ passed|\.+ *\[)(\.?)(\S.*)$", re.MULTILINE)


def pytest_part(
    name: str, tests: Sequence[str], variable: str, *, about: str, things: str, size: int,
    unit: int = 1, at_once: bool = False, linux: bool = False,
) -> Part:
    """Return a part whose trials run ``tests`` with ``variable`` set: to ``unit``, or to the whole
    size ``at_once``.  The tests print their figures."""

    def run(work: Work) -> None:
        work.jobs = 1
        work.each(lambda trial: _run(trial, tests, variable, trial.number if at_once else unit))

    return Part(
        name=name, about=about, things=things, size=size, unit=unit, at_once=at_once,
        linux=linux, run=run, summary=_summary,
    )


def _run(trial: Trial, tests: Sequence[str], variable: str, value: int) -> Figures:
    """Run the tests once."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "--timeout", "0", "-p", "no:cacheprovider",
         "--basetemp", str(trial.folder / "pytest"), *tests],
        cwd=ROOT, env={**os.environ, variable: str(value)}, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    (trial.folder / "output").write_text(done.stdout)
    if done.returncode:
        raise TrialError(f"pytest ended with status {done.returncode}: {done.stdout[-_TAIL:]}")
    return {"said": [text for _, text in _PRINTED.findall(done.stdout)]}


def _summary(trials: Sequence[Figures]) -> Figures:
    """Return what the last run has printed."""
    return {f"the last run, line {number}": line
            for number, line in enumerate(trials[-1]["said"], 1)} if trials else {}
