"""Many clones of one booted Linux at once."""

from soak.pytest_part import pytest_part

PART = pytest_part(
    "clones", ["tests/vm/test_linux_clones.py"], "PYVMM_CLONES",
    about="clones of one Linux, in one process", things="clones", size=100, at_once=True,
    linux=True,
)
