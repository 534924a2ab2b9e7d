"""Which tests are slow: tests/slow.txt names them, from a measurement (``make slow-tests``).

``make check`` leaves them out.  A test that is not listed counts as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

LIST = Path(__file__).resolve().parents[1] / "slow.txt"
MEASURE = "PYVMM_MEASURE_TESTS"
"""The environment variable that has a run of the tests rewrite the list."""
SLOW_S = 0.4
"""A test function that takes so long, all its cases together, is slow."""


def function_of(nodeid: str) -> str:
    """Return the test function's name of a test's: ``tests/x/test_y.py::test_z``."""
    return nodeid.partition("[")[0]


def read_list(path: Path = LIST) -> frozenset[str]:
    """Return the functions that are listed."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return frozenset(line.split()[0] for line in lines if line and not line.startswith("#"))


@functools.cache
def listed() -> frozenset[str]:
    """Return what ``read_list`` does, read once."""
    return read_list()


def write_list(seconds: Mapping[str, float], path: Path = LIST) -> None:
    """List those of the functions in ``seconds`` that are slow, beside those not measured now."""
    found = {name for name, taken_s in seconds.items() if taken_s >= SLOW_S}
    kept = {name for name in read_list(path) if name not in seconds and _exists(name)}
    path.write_text(_text(found | kept), encoding="utf-8")


def _text(names: Iterable[str]) -> str:
    head = f"# Test functions of {SLOW_S} s and more; `make slow-tests` measures and writes this.\n"
    return head + "".join(f"{name}\n" for name in sorted(names))


def _exists(name: str) -> bool:
    """True if the file of the function ``name`` is still there, and has it."""
    file, _, function = name.partition("::")
    path = LIST.parents[1] / file
    return path.is_file() and f"def {function.rpartition('::')[2]}(" in path.read_text("utf-8")
