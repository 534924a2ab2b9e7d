"""An inner session's directory, with kernels of a few bytes in it."""

from __future__ import annotations

import pytest

from tests.support.plugin_guests import write_guests

SETTINGS = """
[pytest]
pyvmm_lab = never
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory with the guests of tests/support/plugin_guests.py, for a pytest of its own."""
    monkeypatch.setenv("COLUMNS", "300")
    write_guests(pytester.path)
    pytester.makeini(SETTINGS)
    return pytester
