"""The processes of launched machines, seen from outside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from tests.support.patience import patient


def is_there(pid: int) -> bool:
    """True if there is a process ``pid``."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + patient(seconds)
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
