"""One run by a runner, whatever it raises: always a result."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.errors import PyvmmError
from pyvmm.matrix.executor import Runner, Watch
from pyvmm.matrix.results import HOST_ERROR, INTERRUPTED_STATUS, RunResult
from pyvmm.matrix.runs import Run
from pyvmm.report import escape
from pyvmm.testing.own_verdicts import FAILED, INTERRUPTED
from pyvmm.testing.verdicts import HOST_STATUS

_INTERRUPTED = "ended by an interrupt"


def attempt(
    runner: Runner, run: Run, folder_of: Callable[[Run], str], watch: Watch
) -> RunResult:
    """Return the result of ``run``, with the logs in the directory that ``folder_of`` makes."""
    began_s = time.monotonic()
    try:
        result = runner(run, folder_of(run), watch)
    except (PyvmmError, OSError) as error:
        result = _without_result(run, watch, str(error))
    except Exception as error:  # a defect of ours must not cost the other runs
        result = _without_result(run, watch, f"internal error: {type(error).__name__}: {error}")
    # A machine that we stop looks to its test like one that ended, or whose agent has gone.
    if watch.is_stopped and not (result.is_ok or result.line or result.verdict == FAILED):
        result = result.replace(
            verdict=INTERRUPTED, exit_status=INTERRUPTED_STATUS, message=_INTERRUPTED
        )
    return result.replace(seconds=result.seconds or time.monotonic() - began_s)


def _without_result(run: Run, watch: Watch, message: str) -> RunResult:
    """Return the result of a run that raised: of an interrupt's doing, if there was one."""
    if watch.is_stopped:
        return RunResult(
            name=run.name, verdict=INTERRUPTED, exit_status=INTERRUPTED_STATUS,
            message=_INTERRUPTED,
        )
    return RunResult(
        name=run.name, verdict=HOST_ERROR, exit_status=HOST_STATUS, message=escape(message[:1000])
    )
