"""The moments that a machine goes back to: checkpoints, snapshots, that of which it is a clone."""

from __future__ import annotations

import pytest

import pyvmm
from tests.support.patience import patient
from tests.support.rewound import WAIT_S, MakeMachine, ask_then, echo, machines_made
from tests.support.tiny_guests import (
    TRIPLE_FAULT,
    echoes,
    out,
    prints,
)

pytestmark = pytest.mark.bare

make = pytest.fixture(machines_made)

POWER_OFF = out(0x600, 0x34)  # sleep control: S5, and go


def test_a_machine_goes_back_to_its_newest_moment_a_checkpoint_or_a_snapshot(
    make: MakeMachine,
) -> None:
    machine = make(echoes())
    machine.start()
    echo(machine, "a")
    first = machine.checkpoint()
    echo(machine, "b")
    with machine.snapshot():
        echo(machine, "c")
        machine.rewind()
        assert list(machine.checkpoints) == [first], "it is before the snapshot"
        echo(machine, "d")
        second = machine.checkpoint()
        echo(machine, "e")
        machine.rewind()
        assert list(machine.checkpoints) == [first, second]
        machine.rewind(first)
        echo(machine, "f")
        machine.rewind()
        assert list(machine.checkpoints) == [first]
        echo(machine, "g")


def test_a_clone_goes_back_to_its_snapshot_again_and_again(make: MakeMachine) -> None:
    machine = make(prints(b"up"), ask_then(prints(b"down"), TRIPLE_FAULT))
    machine.start()
    machine.console.expect("up", patient(WAIT_S))
    seen = {machine.clone_id}
    with machine.snapshot() as snapshot, snapshot.clone() as clone:
        seen.add(clone.clone_id)
        clone.start()
        for count in range(1, 6):
            clone.console.write("!")
            outcome = clone.wait(patient(WAIT_S))
            assert outcome is not None
            assert outcome.kind is pyvmm.Kind.TRIPLE_FAULT
            assert clone.console.text == "down" * count
            clone.rewind()
            seen.add(clone.clone_id)
            clone.resume()
        number = clone.checkpoint()
        clone.rewind()
        assert list(clone.checkpoints) == [number]
        clone.stop()
    assert len(seen) == 7
    assert machine.outcome is None


def test_a_snapshot_of_a_rewound_machine_is_of_what_it_is_now(make: MakeMachine) -> None:
    machine = make(echoes())
    machine.start()
    echo(machine, "a")
    for _ in range(3):
        machine.checkpoint()
        echo(machine, "b")
    machine.rewind(2)
    with machine.snapshot() as snapshot:
        echo(machine, "c")
        for _ in range(2):
            with snapshot.clone() as clone:
                clone.start()
                echo(clone, "d")
    machine.rewind(1)
    echo(machine, "e")
