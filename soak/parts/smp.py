"""Two disks, four vCPUs and a clock on each of them, under load: no gap may be long."""

from soak.pytest_part import pytest_part

PART = pytest_part(
    "smp", ["tests/vm/test_smp.py"], "PYVMM_STRESS_S",
    about="load on four vCPUs of Linux, every gap noted", things="s", size=60, unit=60,
    linux=True,
)
