"""Tracebacks of pyvmm's errors without the frames of pyvmm's, which no test can change."""

from __future__ import annotations

from types import TracebackType

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.testing.verdicts import BootError

NOT_THE_USERS = ("pyvmm", "_pytest", "pluggy", "contextlib")
"""Top-level modules on the way from pytest to pyvmm."""


def is_ours(error: BaseException) -> bool:
    """True for an error that pyvmm raises on purpose."""
    return isinstance(error, PyvmmError)


def shorten(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Cut the frames behind the user's last one off; return False if there is none of the user's.
    """
    last: TracebackType | None = None
    frame: TracebackType | None = excinfo.tb
    while frame is not None:
        module = str(frame.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in NOT_THE_USERS:
            last = frame
        frame = frame.tb_next
    if last is None:
        return False
    last.tb_next = None
    if isinstance(excinfo.value, BootError):
        # "During handling of" would show how a call noticed that the guest has failed.
        excinfo.value.__suppress_context__ = True
    return True
