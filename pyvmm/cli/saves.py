"""Saves and rewinds of a jailed machine: all that they need is at hand before the jail closes."""

from __future__ import annotations

from pyvmm.cli.jailed import kvm_of
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.machine import Machine
    from pyvmm.startup.bundle import Bundle

LATE_MODULES = (
    "pyvmm.attendant.beginning", "pyvmm.attendant.remote_files", "pyvmm.attendant.start",
    "pyvmm.jail.confine",
    "pyvmm.jail.namespaces", "pyvmm.jail.programs", "pyvmm.jail.seccomp", "pyvmm.kvm.answers",
    "pyvmm.startup.late",
)
"""All that only a jailed start imports, when it enters its jail."""


def prepare_saves(machine: Machine, bundle: Bundle) -> None:
    """Have all at hand that ``machine`` is saved and rewound with, once nothing can be opened.

    Modules come from ``bundle``, or from memory from now on; HostError.
    """
    import array  # noqa: F401 - C extensions may be files that must be mapped
    import zlib  # noqa: F401

    from pyvmm.control import machine_saves
    from pyvmm.kvm.answers import answers_of
    from pyvmm.ram.pagemap import keep_pagemap
    from pyvmm.startup.late import LateModules

    LateModules(bundle, machine_saves.LATE_MODULES)
    keep_pagemap(machine.board.memory)
    answers_of(kvm_of(machine)).ask_all()
