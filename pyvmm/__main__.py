"""The program, which the ``pyvmm`` script and ``python -m pyvmm`` run.

Importing this module takes the process's signals, before the other imports of a start.  So a notice
does not kill a run that is about to take notices, and an interrupt prints no traceback.  (Signals
that come earlier, while Python starts, are Python's.)
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the part of `signal` that needs no file
import os
import sys

_HELD = (_signal.SIGUSR1, _signal.SIGWINCH)
"""Blocked until a run or an export lets them in (``pyvmm.run.signals``), and again after it."""


def _interrupted(number: int, _frame: object) -> None:
    # Raise no exception: imports, which are most of a start, print some exceptions and go on.
    os._exit(128 + number)


_signal.pthread_sigmask(_signal.SIG_BLOCK, _HELD)
if _signal.getsignal(_signal.SIGINT) == _signal.default_int_handler:  # else it is ignored
    _signal.signal(_signal.SIGINT, _interrupted)


# Nothing below is needed before the signals are taken.
from pyvmm.cli.errors_told import (  # noqa: E402
    HOST_ERROR_STATUS,
    output_failed,
    say_error,
    show_traceback,
)
from pyvmm.cli.main import SignalsAsTheyAre  # noqa: E402
from pyvmm.cli.main import main as run_command  # noqa: E402


class _SignalsLetIn(SignalsAsTheyAre):
    """Programs started meanwhile inherit no mask, notices do nothing, SIGINT is an exception."""

    def __enter__(self) -> None:
        for number in _HELD:
            if _signal.getsignal(number) == _signal.SIG_DFL:
                _signal.signal(number, lambda *_: None)
        self._is_ours = _signal.getsignal(_signal.SIGINT) == _interrupted
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _HELD)
        if self._is_ours:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)

    def __exit__(self, *_exc: object) -> None:
        _signal.pthread_sigmask(_signal.SIG_BLOCK, _HELD)
        if self._is_ours:
            _signal.signal(_signal.SIGINT, _interrupted)


def main() -> int:
    """Run ``pyvmm`` with the process's arguments, flush its output and return the exit status.

    Print errors of any kind as lines of ours.
    """
    try:
        status = run_command(sys.argv[1:], signals=_SignalsLetIn())
        sys.stdout.flush()
    except OSError as error:
        return output_failed(error)
    except Exception as error:  # a defect of ours; its text may quote anybody
        show_traceback(["-vv"])
        say_error(f"internal error: {type(error).__name__}: {error}")
        return HOST_ERROR_STATUS
    return status


if __name__ == "__main__":
    sys.exit(main())
