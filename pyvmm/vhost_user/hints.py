"""What may be the matter with a socket, for the person who named it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def lab_hint() -> str:
    """To be appended where a socket fails; empty outside the lab."""
    from pyvmm.lab import INSIDE  # of no use but when something failed

    if os.environ.get(INSIDE) != "1":
        return ""
    return (
        " (in the lab: sockets work under /tmp alone, and reach no process outside; start both"
        " ends by one pyvmm lab)"
    )


def why_no_connection(path: str, error: Exception) -> str:
    """Why ``path`` could not be connected to."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        mode = 0
    if mode and not stat.S_ISSOCK(mode):
        return "it is no socket"
    return f"{getattr(error, 'strerror', None) or error}{lab_hint()}"
