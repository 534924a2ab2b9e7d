"""A machine held still, so that it can be saved or put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine


@contextlib.contextmanager
def still(machine: Machine, call: str) -> Iterator[None]:
    """Hold ``machine`` quiesced, with every byte of its console observed, for ``call``.

    Afterwards it is as it was: running, paused or quiesced, or as others asked for meanwhile.  It
    cannot be closed meanwhile.  SnapshotError if its run is over or ends before it is still;
    RuntimeError in a thread of the run, and for a machine that is being saved or rewound.
    """
    runner = machine.runner
    runner.refuse_own_threads(call)
    with machine.lock:
        check_open(machine, call)
        if not runner.hold(call):
            raise SnapshotError(call, "the run is over")
        try:
            runner.in_house(machine.output.observe_all)
            yield
        finally:
            runner.let_go()


def check_open(machine: Machine, call: str) -> None:
    """RuntimeError once ``machine`` is closed."""
    if machine.vm.fd < 0:
        raise RuntimeError(f"{call} needs an open machine: this one was closed")
