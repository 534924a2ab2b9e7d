"""The parts of the jail that this host has: a process that is made for it enters the jail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from pyvmm.errors import PyvmmError
from pyvmm.jail import seccomp
from pyvmm.jail.confine import Plan, confine

FILTERS = "a filter of system calls for each thread"
_REMEDIES = (
    ("an empty root", "run where root may make namespaces (CAP_SYS_ADMIN), or as a user"),
    ("Landlock", "use Linux 5.13 or newer with lsm=landlock,... among its boot parameters; a "
     "container's filter must allow landlock_create_ruleset and landlock_restrict_self"),
    (FILTERS, "a container's filter must allow seccomp (Docker's own does)"),
)
_ANY_REMEDY = "loosen the container or sandbox around this process"
_WRITE_XOR_EXECUTE = "W^X memory"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the jail: its name, if it is lacking also why and what that means, and a remedy."""

    text: str
    is_there: bool
    remedy: str = ""


def parts() -> Iterator[Part]:
    """Yield the parts that a run would have here and now, then those it would lack."""
    in_force, lacking = _tried()
    for name in in_force:
        yield Part(name, is_there=True)
    if in_force and _WRITE_XOR_EXECUTE not in in_force:
        yield Part(f"{_WRITE_XOR_EXECUTE}; the filter alone forbids it", is_there=False,
                   remedy="use Linux 6.3 or newer")
    for line in lacking:
        text = line.removeprefix("the jail lacks ")
        remedies = (remedy for name, remedy in _REMEDIES if text.startswith(name))
        yield Part(text, is_there=False, remedy=next(remedies, _ANY_REMEDY))


def _tried() -> tuple[list[str], list[str]]:
    """Return what a child process has in force and what it lacks, once it is in the jail."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            found = _enter(into)
            os.write(into, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    if not answer:
        return [], ["all of it: a process that enters it is killed"]
    in_force, lacking = json.loads(answer)
    return in_force, lacking


def _enter(kept: int) -> tuple[list[str], list[str]]:
    """Enter the jail; return what is in force, and what is lacking."""
    namespaces = None
    if os.geteuid() == 0:
        from pyvmm.jail.namespaces import Namespaces

        namespaces = Namespaces()
    try:
        found = confine(Plan(kept=(kept,), namespaces=namespaces))
        in_force, lacking = list(found.in_force), list(found.lacking)
    except (OSError, PyvmmError) as error:
        return [], [f"all of it: {error}"]
    reason = seccomp.why_not()
    if reason:
        lacking.append(f"{FILTERS}: {reason}")
    else:
        in_force.append(FILTERS)
    return in_force, lacking
