"""One run of a matrix: a guest to boot, and a command to run in it."""

from __future__ import annotations

from pyvmm.config import DiskConfig
from pyvmm.launcher.limits import BOOT_TIMEOUT_S
from pyvmm.startup.types import Record
from pyvmm.testing.boot_test import TIMEOUT_S
from pyvmm.testing.fail_on import FAIL_ON, FailOn

AXES = ("kernel", "disk", "memory", "cpus", "command")
"""The names of a run's places, in the order in which they make its name."""


class Guest(Record):
    """The machine of a run.

    Paths are absolute.  ``memory`` is a text as
    ``512M``.  ``agent`` is ``inject`` or ``image``.
    """

    kernel: str
    initrd: str = ""
    append: str = ""
    disks: tuple[DiskConfig, ...] = ()
    memory: str = "256M"
    cpus: int = 1
    agent: str = "inject"


class Order(Record):
    """The command of a run, and the limits of the run.

    ``expect`` are regular expressions for lines of the console.  ``puts`` are pairs of a path here
    and one in the guest, ``gets`` pairs of a path in the guest and one below the run's ``files``
    directory.
    """

    argv: tuple[str, ...]
    expect: tuple[str, ...] = ()
    fail_on: FailOn = FAIL_ON
    puts: tuple[tuple[str, str], ...] = ()
    gets: tuple[tuple[str, str], ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    timeout_s: float = TIMEOUT_S
    boot_timeout_s: float = BOOT_TIMEOUT_S


class Run(Record):
    """One run.  ``places`` are the names of its entries, in the order of AXES; an axis that the
    file does not have is ""."""

    name: str
    places: tuple[str, ...]
    guest: Guest
    order: Order

    def place(self, axis: str) -> str:
        """Return the name of the run's entry on ``axis``."""
        return self.places[AXES.index(axis)]
