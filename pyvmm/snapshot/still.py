"""A machine held still, so that it can be saved or put back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pyvmm.errors import SnapshotError, StateError
from pyvmm.machine import Machine

STILL_S = 30.0
"""Seconds that a guest may take to come to rest: a disk may be slow, a console full."""


@contextlib.contextmanager
def one_moment(machine: Machine, call: str) -> Iterator[None]:
    """Wait until no other thread keeps a moment of ``machine`` or goes back to one; then for
    ``call`` have them wait.

    A live snapshot lasts until RAM is written: the child that writes it maps the memory that the
    next checkpoint changes.  RuntimeError in a thread of the run, and in a handler of a signal that
    arrives meanwhile.
    """
    machine.runner.refuse_own_threads(call)
    with machine.moments:
        if machine.moment:
            raise RuntimeError(f"{call} inside {machine.moment} would wait for ever")
        machine.moment = call
        try:
            yield
        finally:
            machine.moment = ""


@contextlib.contextmanager
def still(machine: Machine, call: str) -> Iterator[None]:
    """Hold ``machine`` quiesced, with every byte of its console observed, for ``call``.

    Afterwards it is as it was: running, paused or quiesced, or as others asked for meanwhile.  It
    cannot be closed meanwhile.  SnapshotError if its run is over or ends before it is still, or if
    that takes more than STILL_S seconds.  RuntimeError in a thread of the run, and for a
    machine that is being saved or rewound.
    """
    runner = machine.runner
    runner.refuse_own_threads(call)
    with machine.lock:
        check_open(machine, call)
        if not held(machine, call):
            raise SnapshotError(call, "the run is over")
        try:
            runner.in_house(machine.output.observe_all)
            yield
        finally:
            let_go(machine)


def held(machine: Machine, call: str) -> bool:
    """Hold ``machine`` until ``let_go`` of its runner: see ``Runner.hold``.

    False if its run is over or ends meanwhile.  SnapshotError if that takes more than STILL_S
    seconds, and nothing is held then.
    """
    runner, until_s = machine.runner, time.monotonic() + STILL_S
    if runner.hold(call, STILL_S):
        return True
    if runner.is_ending or time.monotonic() < until_s:
        return False
    raise SnapshotError(
        call, f"the guest did not come to rest in {STILL_S:g} s: a vCPU or a disk waits for this "
        "host (does nobody read the console?)"
    )


def let_go(machine: Machine) -> None:
    """End what ``held`` began, also if a KeyboardInterrupt comes just then."""
    try:
        machine.runner.let_go()
    except BaseException:
        machine.runner.let_go()
        raise


def state_of(machine: Machine, call: str) -> dict[str, object]:
    """Return the state of ``machine``, which is still: all but RAM and disks.

    SnapshotError if a part has no state to give, and if the run ends meanwhile.
    """
    try:
        return machine.save()
    except StateError as error:
        raise SnapshotError(call, f"a part of the machine cannot be saved: {error}") from error
    except RuntimeError as error:
        if machine.runner.is_ending:  # a deadline, which no hold holds up
            raise SnapshotError(call, "the run has ended meanwhile") from error
        raise


def check_open(machine: Machine, call: str) -> None:
    """RuntimeError once ``machine`` is closed."""
    if machine.vm.fd < 0:
        raise RuntimeError(f"{call} needs an open machine: this one was closed")
