"""Snapshots of a Linux that works on its disks, one after another."""

from soak.pytest_part import pytest_part

PART = pytest_part(
    "snapshots", ["tests/vm/test_linux_snapshots.py"], "PYVMM_SNAPSHOTS",
    about="snapshots of a Linux that works on its disks", things="snapshots", size=50, unit=50,
    linux=True,
)
