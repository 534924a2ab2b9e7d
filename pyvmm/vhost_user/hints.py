"""Likely causes of trouble with a socket, for the person who named it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def lab_hint() -> str:
    """Return words to append to the error about a socket; empty outside the lab."""
    from pyvmm.lab import INSIDE  # needed only after an error

    if os.environ.get(INSIDE) != "1":
        return ""
    return (
        " (in the lab: sockets work under /tmp alone, and reach no process outside; start both"
        " ends by one pyvmm lab)"
    )


def why_no_connection(path: str, error: Exception) -> str:
    """Return the reason why ``path`` could not be connected to."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        mode = 0
    if mode and not stat.S_ISSOCK(mode):
        return "it is no socket"
    return f"{getattr(error, 'strerror', None) or error}{lab_hint()}"
