"""Take a machine back to a state that it has had: running, paused or ended.

The threads, KVM's VM and all descriptors of the machine stay.  Only what the guest can know of goes
back: RAM, disks, vCPUs, chips, devices, and what is known of the guest (docs/time-travel.md).
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.still import check_open, held, let_go
from pyvmm.startup.types import Record

CALL = "rewind()"


class WayBack(Record):
    """A way back to ``state``, which ``Machine.save`` returned.

    ``bring_back`` gives RAM and disks their content of then, once nothing moves.  ``attach`` is
    called right before the guest goes on, for whoever looks at it from outside.  Called with True,
    it must give the runner again what ``on_wake`` and ``when_over`` had, because a new run begins.
    """

    state: object
    bring_back: Callable[[], None]
    attach: Callable[[bool], None] = lambda _begins_anew: None


def put_back(machine: Machine, way: WayBack) -> None:
    """Have ``machine`` go on from another moment of its own.

    A machine that runs goes on running, a paused one stays paused.  One that has ended is paused
    then.  Each time the guest becomes another clone, with a ``clone_id`` of its own.

    RuntimeError for a machine that was not started, in a thread of the run, once the machine was
    closed, and while it is saved or rewound.  SnapshotError, and the guest goes on as it was, if it
    does not come to rest within STILL_S seconds.  If anything else fails, the machine has no whole
    guest any more: its run ends with HOST_ERROR, and the error is raised.
    """
    runner = machine.runner
    runner.refuse_own_threads(CALL)
    with machine.lock:
        check_open(machine, CALL)
        if not runner.has_begun:
            raise RuntimeError(f"{CALL}: the machine was not started")
        while not runner.is_over:
            if _put_back_alive(machine, way):
                return
            runner.wait()  # it was about to end
        _put_back_ended(machine, way)


def _put_back_alive(machine: Machine, way: WayBack) -> bool:
    """Put back a machine whose run is not over; False, and nothing done, if it is ending."""
    runner = machine.runner
    if not held(machine, CALL):
        return False
    try:
        runner.in_house(lambda: _forget_present(machine))
        if runner.is_ending:
            return False
        try:
            _bring_back(machine, way)
            way.attach(False)
            machine.catch_up()
            machine.limit_time()
        except BaseException as error:
            runner.finish(Outcome(Kind.HOST_ERROR, detail=f"{CALL} failed: {error}"))
            raise
    finally:
        let_go(machine)
    return True


def _put_back_ended(machine: Machine, way: WayBack) -> None:
    """Put back a machine whose run is over, and start it anew, paused."""
    machine.wait()
    if not machine.runner.stopped:
        raise SnapshotError(CALL, "a thread of the run did not stop")
    _forget_present(machine)
    _bring_back(machine, way)
    way.attach(True)
    machine.run_again()
    machine.pause()  # the vCPUs are on their way to the gate
    machine.catch_up()
    machine.limit_time()


def _bring_back(machine: Machine, way: WayBack) -> None:
    way.bring_back()
    machine.put_back(way.state)
    machine.renew_clone_id()


def _forget_present(machine: Machine) -> None:
    """Let nothing of the guest as it is now reach the one that is brought back.

    The waiting bytes of its console are shown, but tell nothing of the new guest; ends that are due
    are taken back.  In the thread that keeps house.
    """
    machine.verdict.forget_ends()
    machine.output.observe_all()
    machine.runner.forget_halts()
