"""Deadlines that suit the machine the tests run on, and how busy it is.

A test waits for what must come, and fails if it does not.  So that it need not fail where all is
only slow, each such wait is ``patient(SECONDS)``: the seconds that are ample on two cores at rest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time

AT_REST_S = {"host": 0.1, "lab": 1.0}
"""What the calibration takes on a machine at rest; the lab's deadlines are made for the lab."""
MOST = 20.0
"""A machine so slow hangs."""
_WORK = "for i in range(500_000): pass"


def patient(seconds: float) -> float:
    """``seconds``, times as much as this machine is slower, or busier, than one at rest."""
    load = 1.0
    with contextlib.suppress(OSError):  # a test may have used up all descriptors
        load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return seconds * min(max(1.0, slowness(), load), MOST)


@functools.cache
def slowness() -> float:
    """How many times longer than at rest the start of a Python takes here: measured once."""
    place = "lab" if os.environ.get("PYVMM_LAB") else "host"
    took_s = 0.0
    for _ in range(3):
        began_s = time.monotonic()
        subprocess.run([sys.executable, "-I", "-S", "-c", _WORK], check=True)
        took_s = max(took_s, time.monotonic() - began_s)
    return took_s / AT_REST_S[place]
