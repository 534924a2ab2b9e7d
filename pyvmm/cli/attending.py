"""The program of an attendant's process: its duties, made of what the start of a machine told it.

``attendant/start.py`` starts it, and nobody else.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal

import pyvmm
from pyvmm.attendant.beginning import Beginning
from pyvmm.attendant.duties import Duties
from pyvmm.attendant.process import attend
from pyvmm.cli.unattended import explain
from pyvmm.config import DiskConfig, RunConfig, VhostUserDiskConfig
from pyvmm.report import say
from pyvmm.startup.bundle import Bundle, default_path
from pyvmm.startup.bundle_writing import update
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.storage.open import DiskSource

if TYPE_CHECKING:
    from pyvmm.run.outcome import Outcome
    from pyvmm.run.verdict import Evidence
    from pyvmm.vhost_user.socket_name import SocketName

_PR_SET_NAME = 15


def main() -> None:
    """Attend one machine, and end this process."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"pyvmm-attendant")
    try:
        attend(duties_of, version=pyvmm.__version__)
    except Exception as error:  # a defect of ours; its text may quote anybody
        say(f"internal error beside the machine: {type(error).__name__}: {error}")
    finally:
        os._exit(0)  # an explanation that nobody waits for ends as well


def duties_of(beginning: Beginning, socket_name: SocketName | None) -> Duties:
    """Return the duties that ``beginning`` tells of."""
    def explained(outcome: Outcome, evidence: Evidence) -> list[str]:
        return explain(
            config_of(beginning), outcome, evidence, version=beginning.kernel_version,
            is_linux=beginning.is_linux,
        )

    def tidy() -> None:
        if beginning.modules:
            for name in beginning.modules:
                importlib.import_module(name)
            update(Bundle(default_path(beginning.bundle)), beginning.modules)

    return Duties(
        explain=explained, tidy=tidy, socket_name=socket_name,
        snapshot_path=beginning.snapshot_path, any_snapshot=beginning.any_snapshot,
        most_scratch_files=beginning.most_scratch_files,
    )


def config_of(beginning: Beginning) -> RunConfig:
    """Return as much of the machine's configuration as an explanation looks at."""
    return RunConfig(
        kernel=beginning.kernel, initrd=beginning.initrd, cmdline=beginning.cmdline,
        append=beginning.append, agent=beginning.agent, discovery=beginning.discovery,
        cpus=beginning.cpus,
        disks=tuple(
            VhostUserDiskConfig(socket=str(index)) if place == "-" else
            DiskConfig(source=DiskSource(location=place, read_only=True))
            for index, place in enumerate(beginning.disks)
        ),
    )
