"""Tells if this host's KVM runs a stock Linux kernel, and how to run elsewhere if not."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

from pyvmm.errors import PyvmmError
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.x86 import layout
from pyvmm.x86.image import ImageFile
from pyvmm.x86.loader import parse_kernel

if TYPE_CHECKING:
    from os import PathLike

INSIDE = "PYVMM_LAB"
"""``pyvmm.lab.INSIDE``, without the imports of the lab."""
DOCTOR_TIMEOUT_S = 120.0
_FAILED = "FAIL  "
_REMEDY = "remedy: "
_TRIAL = "guest trial: "
_CANNOT = "this host's KVM cannot run a stock Linux kernel"


@cache
def kvm_problem() -> str:
    """Return "" if a stock Linux kernel runs on this host's KVM, else one line that says why not.

    It asks ``pyvmm doctor`` in a process of its own (0.1 s), because the trial needs a main thread
    and its signals.  The answer is remembered.  The lab's KVM is complete, so there is no doctor
    inside: it would take seconds.
    """
    if os.environ.get(INSIDE):
        return ""
    command = [sys.executable, "-m", "pyvmm", "doctor"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=DOCTOR_TIMEOUT_S, env=_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"this host's KVM: pyvmm doctor cannot look at it: {error}"
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stdout.splitlines()]
    failed = next((line for line in lines if line.startswith(_FAILED)), "")
    after = lines[lines.index(failed) + 1] if failed and failed != lines[-1] else ""
    why = failed.removeprefix(_FAILED) or done.stderr.strip() or "pyvmm doctor does not say why"
    if why.startswith(_TRIAL):
        # The instruction's bytes, and the lab as the remedy, are for readers of the doctor.
        name = why.removeprefix(_TRIAL).partition(":")[0]
        return f"{_CANNOT}: the trial of {name} failed (pyvmm doctor says more)"
    remedy = f" ({after.removeprefix(_REMEDY)})" if after.startswith(_REMEDY) else ""
    return f"{_CANNOT}: {why}{remedy}"


def problem_for(kernel: str | PathLike[str]) -> str:
    """Return ``kvm_problem``, or "" if ``kernel`` is known to be no Linux: any KVM may do then.

    A kernel that cannot be read has no problem here: who boots it complains.
    """
    if not kvm_problem():
        return ""
    try:
        with ImageFile(kernel) as image:
            found = parse_kernel(image, layout.MAX_MEMORY)
    except (OSError, PyvmmError):
        return ""
    return kvm_problem() if found.is_linux else ""


def _environment() -> dict[str, str]:
    """Return the environment in which ``python -m pyvmm`` is this package."""
    import pyvmm

    place = os.path.dirname(os.path.dirname(os.path.abspath(pyvmm.__file__)))
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{known}" if known else place}
