"""No test gives up after so many seconds of its own: deadlines suit the machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.patience import patient

TESTS = Path(__file__).parent
NUMBER = r"(?:\d+\.?\d*|[A-Z_]+_S)\b"
# What must come within a time.  "not x.wait(0.05)" and "x.wait(0.05) is None" look whether
# something that must not comes; 0.0 waits for nothing.
DEADLINES = re.compile(
    rf"(?<![\w.])(?<!not )[\w.]+\.(?:wait|join|settimeout)\((?!0\.0\)){NUMBER}\)(?! is None)"
    rf"|(?<![_-])timeout={NUMBER}"
    rf"|monotonic\(\) \+ {NUMBER}|(?:monotonic\(\) - \w+|\btook_s(?:\[\d\])?) <=? {NUMBER}"
)
PATIENT_THEMSELVES = {"support/patience.py", "test_patience.py"}
SHORT_WAITS = re.compile(r"monotonic\(\) \+ 0?\.\d")
OF_GUESTS = re.compile(r"@pytest\.mark\.pyvmm\(")
"""The limit is what the test is about."""


def test_fault_43_no_deadline_is_the_same_everywhere() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{number}: {line.strip()}"
        for path in sorted(TESTS.rglob("*.py"))
        if str(path.relative_to(TESTS)) not in PATIENT_THEMSELVES
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if DEADLINES.search(line)
        and not SHORT_WAITS.search(line) and not OF_GUESTS.search(line)
    ]
    assert found == []


def test_fault_43_deadlines_grow_with_the_load_and_never_shrink(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(patience, "slowness", lambda: 0.5)
    assert patient(2) == 2
    monkeypatch.setattr(patience, "slowness", lambda: 3.0)
    assert patient(2) == 6
    monkeypatch.setattr(os, "getloadavg", lambda: (16.0, 0.0, 0.0))
    assert patient(2) == 16
    monkeypatch.setattr(os, "getloadavg", lambda: (9999.0, 0.0, 0.0))
    assert patient(2) == 2 * patience.MOST


def test_fault_43_a_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert patience.slowness() > 0
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    assert patience.slowness() == patience.slowness()
