"""A part of the soak for tests: short trials, and some that do what must not be.

``SOAK_TOY`` names what one in ten does: ``fails``, ``raises``, ``daemon``, ``file``, ``cannot``,
``lasts`` or ``none``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence

from soak.errors import PartError, TrialError
from soak.part import Figures, Part, Trial, Work


def _trial(trial: Trial) -> Figures:
    time.sleep(0.02)
    kind = os.environ.get("SOAK_TOY", "none") if trial.number % 10 == 3 else "none"
    match kind:
        case "fails":
            raise TrialError("planted")
        case "raises":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(trial.folder / "socket"))
            raise ZeroDivisionError("planted")
        case "daemon":
            subprocess.run(["setsid", "sh", "-c", "sleep 300 >/dev/null 2>&1 &"], check=True)
        case "file":
            (trial.folder.parent / "left").write_text("x")
        case "lasts":
            subprocess.run(["sleep", "300"], check=True)
        case "cannot":
            raise PartError("planted")
    return {"random": trial.random.randrange(1_000_000)}


def _run(work: Work) -> None:
    work.each(_trial)


def _summary(trials: Sequence[Figures]) -> Figures:
    return {"sum": sum(line["random"] for line in trials)}


PART = Part(name="toy", about="a toy", things="toys", size=40, run=_run, summary=_summary)
