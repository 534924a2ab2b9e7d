"""What the attendant of a command line's machine has to know and to do (``attendant/``)."""

from __future__ import annotations

import os

import pyvmm
from pyvmm.config import MAX_DISKS, DiskConfig
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import SimpleNamespace

    from pyvmm.attendant.beginning import Beginning
    from pyvmm.config import RunConfig
    from pyvmm.machine import Machine
    from pyvmm.run.outcome import Outcome
    from pyvmm.run.verdict import Evidence

_SCRATCH_FILES_PER_DISK = 8
_SCRATCH_FILES_OF_CLIENTS = 1 << 16  # each checkpoint and rewind may need one for each disk
