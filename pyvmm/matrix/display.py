"""Choose how a matrix shows how it gets on."""

from __future__ import annotations

import os

from pyvmm.matrix.progress import PlainProgress, Progress


def progress_for(count: int) -> Progress:
    """Return the live table if standard error is a terminal and rich is there, else the lines."""
    if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb":
        try:
            from pyvmm.matrix.live import LiveProgress
        except ImportError:
            pass
        else:
            return LiveProgress(count)
    return PlainProgress(count)
