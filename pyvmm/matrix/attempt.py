"""One run by a runner, whatever it raises: always a result."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.errors import PyvmmError
from pyvmm.matrix.executor import Runner, Watch
from pyvmm.matrix.results import (
    HOST_STATUS,
    INTERRUPTED,
    INTERRUPTED_STATUS,
    NOT_STARTED,
    RunResult,
)
from pyvmm.matrix.runs import Run


def attempt(
    runner: Runner, run: Run, folder_of: Callable[[Run], str], watch: Watch
) -> RunResult:
    """Return the result of ``run``, with the logs in the directory that ``folder_of`` makes."""
    began = time.monotonic()
    try:
        result = runner(run, folder_of(run), watch)
    except (PyvmmError, OSError) as error:
        result = _without_result(run, str(error))
    except Exception as error:  # a defect of ours must not cost the other runs
        result = _without_result(run, f"internal error: {type(error).__name__}: {error}")
    if watch.is_stopped and not result.is_ok:
        result = result.replace(
            verdict=INTERRUPTED, exit_status=INTERRUPTED_STATUS, message="ended by an interrupt"
        )
    return result.replace(seconds=result.seconds or time.monotonic() - began)


def _without_result(run: Run, message: str) -> RunResult:
    return RunResult(
        name=run.name, verdict=NOT_STARTED, exit_status=HOST_STATUS, message=message[:1000]
    )
