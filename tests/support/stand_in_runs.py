"""A runner of a matrix that boots nothing: a run's command says how it ends."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.matrix.executor import Watch
from pyvmm.matrix.results import RunResult
from pyvmm.matrix.runs import Run
from pyvmm.testing.own_verdicts import FAILED, INTERRUPTED, PASSED
from pyvmm.testing.timeline import Phase

LONGEST_S = 300.0
TICK = 0.05


def stand_in(run: Run, folder: str, watch: Watch) -> RunResult:
    """Do what the command of ``run`` says: a word, and its argument."""
    word, argument = (*run.order.argv, "")[:2]
    Path(folder, "console.log").write_text(f"the console of {run.name}\n")
    watch.on_phase("kernel")
    done = RunResult(
        name=run.name, verdict=PASSED, exit_status=0, logs=("console.log",), seconds=1.0,
        phases=(Phase(name="kernel", begin_s=0.1, end_s=0.6),
                Phase(name="command", begin_s=0.6, end_s=1.0)),
    )
    match word:
        case "status":
            return done if argument == "0" else done.replace(
                verdict=FAILED, exit_status=int(argument), message=f"exited with {argument}"
            )
        case "panic":
            return done.replace(
                verdict="panic", exit_status=121, message="kernel panic: <b>&\x1b[31m",
                line="[    1.5] Kernel panic - not syncing: <b>&\x1b[31m",
                before=tuple(f"[    1.{number:02}] line {number}" for number in range(40)),
            )
        case "log":
            Path(folder, "stdout.log").write_bytes(b"x" * int(argument))
        case "wait":  # until somebody makes the file, or ends the run
            Path(f"{argument}.{run.name}").write_text(f"{os.getpid()}")
            ended = threading.Event()
            watch.adopt(ended.set)
            for _ in range(int(LONGEST_S / TICK)):
                if Path(argument).exists():
                    return done
                if ended.wait(timeout=TICK):
                    Path(f"{argument}.{run.name}.ended").touch()
                    return done.replace(verdict=INTERRUPTED, exit_status=130, message="was stopped")
        case "hang":  # whoever asks it to end
            Path(argument).touch()
            threading.Event().wait(LONGEST_S)
        case "host":
            raise HostError(f"{argument} is missing")
        case "full":
            raise OSError(28, "No space left on device", argument)
        case "defect":
            raise ZeroDivisionError(argument)
    return done
