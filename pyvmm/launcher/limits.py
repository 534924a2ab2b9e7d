"""Time limits that depend on the host: the lab's emulated processor is some thirty times slower."""

from __future__ import annotations

import os

BOOT_TIMEOUT_S = 60.0
LAB_BOOT_TIMEOUT_S = 300.0
_IN_THE_LAB = "PYVMM_LAB"
"""``pyvmm.lab.INSIDE``, without the imports of the lab."""


def boot_timeout_s() -> float:
    """Return the seconds that a boot may take unless somebody says otherwise; more in the lab."""
    return LAB_BOOT_TIMEOUT_S if os.environ.get(_IN_THE_LAB) else BOOT_TIMEOUT_S
