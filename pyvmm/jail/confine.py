"""All that the process gives up at once, before the guest's first instruction.

The seccomp filter is not here, because each thread has its own (``jail.seccomp``).
"""

from __future__ import annotations

import os
import time

from pyvmm.errors import HostError
from pyvmm.jail import descriptors, landlock, privileges
from pyvmm.jail.calls import system_call
from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.jail.cgroup import Cgroup
    from pyvmm.jail.namespaces import Namespaces
    from pyvmm.jail.root import User

_LANDLOCK = "Landlock", "the filter alone keeps files out of reach"
_ROOT = ("an empty root and namespaces of its own",
         "Landlock and the filter alone keep files and the network out of reach")
"""Names of steps, and how things are without them."""
_UNSHARE, _CLONE_THREAD = 272, 0x0001_0000
_THREAD_ENDS_S = 1.0
"""A thread that was joined may still be ending."""


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


class Confinement(Record):
    """The jail in which the process is: a line for each part in force, and for each lacking."""

    in_force: tuple[str, ...]
    lacking: tuple[str, ...]


def confine(plan: Plan) -> Confinement:
    """Put this process into the jail of ``plan``; there is no way back.

    No thread but the caller may run: others would stay free.  A part that the host lacks is a line
    of ``lacking``; with ``plan.strict`` it is a HostError.  A user or a cgroup that cannot be had
    is a ConfigError in any case.
    """
    _check_alone()
    steps = _Steps(plan.strict)
    if plan.strict:
        # While nothing is given up that the caller needs to tell of an error, such as files.
        steps.try_out(*_LANDLOCK, landlock.abi)
        if plan.namespaces is not None:
            steps.try_out(*_ROOT, plan.namespaces.check)
    steps.take("no_new_privs", "programs may gain some", privileges.no_new_privileges)
    # Steps that need rights or paths come before those that take them away.
    if plan.cgroup is not None:
        plan.cgroup.join()
        steps.in_force.append(f"cgroup {plan.cgroup.directory}")
    if plan.namespaces is not None:
        steps.take(*_ROOT, plan.namespaces.enter)
    if plan.user is not None:
        plan.user.become()
        steps.in_force.append(f"user {plan.user.uid}, group {plan.user.gid}")
    steps.take("empty capability sets", "those that it has stay", privileges.drop_capabilities)
    # After the change of the user, which sets it anew.
    steps.take("hidden memory", "this user's processes can read it", privileges.hide_memory)
    steps.take("data that cannot be executed", "all of it can be", privileges.no_implied_code)
    steps.take("W^X memory", None, privileges.no_new_code)
    steps.take("closed descriptors", "others that were inherited stay open",
               lambda: descriptors.close_others(plan.kept))
    # Landlock needs a descriptor for a moment, so the limit of open files comes last.
    forbidden: list[str] = []
    steps.take(*_LANDLOCK, lambda: forbidden.extend(landlock.forbid_all()))
    if forbidden:
        steps.in_force[-1] = f"Landlock ({', '.join(forbidden)})"
    steps.take("limits of files and core dumps", "there are none", lambda: (
        privileges.limit_resources(plan.kept, plan.more_files, plan.largest_file_bytes)
    ))
    return Confinement(in_force=tuple(steps.in_force), lacking=tuple(steps.lacking))


class _Steps:
    """Takes steps of the jail, and notes which are in force and which this host lacks."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self.in_force: list[str] = []
        self.lacking: list[str] = []

    def take(self, name: str, otherwise: str | None, step: Callable[[], object]) -> None:
        """Call ``step``; ``otherwise`` is how things are if it fails.

        A step with None makes another one stronger.  Hosts may lack it, as older kernels do.
        """
        if self.try_out(name, otherwise, step):
            self.in_force.append(name)

    def try_out(self, name: str, otherwise: str | None, step: Callable[[], object]) -> bool:
        """Call ``step``, which need not give up anything; True if it does not fail."""
        try:
            step()
        except OSError as error:
            if otherwise is not None:
                line = f"the jail lacks {name}: {error.strerror}; {otherwise}"
                if self._strict:
                    raise HostError(f"--jail strict: {line}") from error
                self.lacking.append(line)
            return False
        return True


def _check_alone() -> None:
    """HostError if another thread runs, as one of a library does."""
    end_s = time.monotonic() + _THREAD_ENDS_S
    while not _is_alone():
        if time.monotonic() > end_s:
            raise HostError("the jail cannot be entered: other threads run already")
        os.sched_yield()


def _is_alone() -> bool:
    try:
        # unshare(2): it does nothing if this process has one thread, and fails otherwise.
        system_call(_UNSHARE, _CLONE_THREAD)
    except OSError:  # also in a container that forbids the call
        # A directory's links: itself, its parent, and its subdirectories, one for each thread.
        return os.stat("/proc/self/task").st_nlink == 3
    return True
