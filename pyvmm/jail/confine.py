"""All that the process gives up at once, before the guest's first instruction.

The seccomp filter is not here, because each thread has its own (``jail.seccomp``).
"""

from __future__ import annotations

import os

from pyvmm.errors import HostError
from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from pyvmm.jail.root import Cgroup, Namespaces, User


class Plan(Record):
    """The jail that a process is to enter.

    ``kept`` is every descriptor that stays open, standard input, output and error too.  All others
    are closed behind their owners' backs, so whoever owns one closes it before.  ``more_files`` is
    how many descriptors may be open besides at one time (clients of a control socket).
    ``largest_file_bytes`` is the size beyond which no file can be written; None for no limit, as
    for a log.  With ``strict`` a part of the jail that this host lacks is a HostError.
    """

    kept: tuple[int, ...]
    more_files: int = 0
    largest_file_bytes: int | None = None
    strict: bool = False
    user: User | None = None
    cgroup: Cgroup | None = None
    namespaces: Namespaces | None = None
    """Made early by ``root.Namespaces.prepare``; None for none."""


class Confinement(Record):
    """The jail in which the process is: a line for each part in force, and for each lacking."""

    in_force: tuple[str, ...]
    lacking: tuple[str, ...]


def confine(plan: Plan) -> Confinement:
    """Put this process into the jail of ``plan``; there is no way back.

    To be called when no thread but the caller runs: threads that exist would stay free.  A part
    that the host lacks is a line of ``lacking``; with ``plan.strict`` it is a HostError.  A user or
    a cgroup that cannot be had is an error in any case (ConfigError).
    """
    threads = os.stat("/proc/self/task").st_nlink - 2
    if threads != 1:
        raise HostError(f"the jail cannot be entered: {threads - 1} other threads run already")
    raise NotImplementedError(plan)
