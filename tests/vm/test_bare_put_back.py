"""A machine that has run is put back to a state of its own, RAM and disk by hand, and goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.machine import Machine
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.rewind import WayBack, put_back
from pyvmm.snapshot.still import still
from tests.support.disk_guest import (
    built,
    disk_machine,
    expected_disk,
    read_memory,
    rounds_done,
    wait_for_rounds,
    write_memory,
)
from tests.support.patience import patient
from tests.vm.test_bare_save import comparable

pytestmark = pytest.mark.bare

ROUNDS = 300
STOPPED = Outcome(Kind.STOPPED)
DONE = Outcome(Kind.GUEST_STATUS, 0)
WAIT_S = 30.0


class Kept:
    """A moment of ``machine``: its state, and its RAM and disk as copies."""

    def __init__(self, machine: Machine, disk: Path) -> None:
        self._machine, self._disk = machine, disk
        with still(machine, "save()"):
            self.state = machine.save()
            self.memory, self.content = read_memory(machine), disk.read_bytes()

    def bring_back(self) -> None:
        write_memory(self._machine, self.memory)
        with self._disk.open("r+b") as file:
            file.write(self.content)

    def put_back(self, attach: Callable[[bool], None] = lambda _: None) -> None:
        way = WayBack(state=self.state, bring_back=self.bring_back, attach=attach)
        put_back(self._machine, way)


@pytest.mark.parametrize("mmio", ["mapped", "trapped"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_quiesced_machine_has_the_same_state_again(
    tmp_path: Path, cpus: int, packed: bool, mmio: str
) -> None:
    config = disk_machine(tmp_path, rounds=ROUNDS, packed=packed, cpus=cpus, mmio=mmio)
    disk = tmp_path / "disk.img"
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, 40)
        kept = Kept(machine, disk)
        for goal in (100, 200, 250):
            wait_for_rounds(machine, goal)
            with still(machine, "rewind()"):
                time.sleep(0.02)  # KVM's work queue may have an interrupt of before on its way
                kept.bring_back()
                machine.put_back(kept.state)
                assert comparable(machine.save()) == comparable(kept.state)
                assert read_memory(machine) == kept.memory
                machine.catch_up()
        wait_for_rounds(machine, ROUNDS)
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE
    assert disk.read_bytes() == expected_disk(ROUNDS)


def test_a_running_machine_goes_on_running_and_a_paused_one_stays_paused(tmp_path: Path) -> None:
    config = disk_machine(tmp_path, rounds=ROUNDS)
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, 20)
        kept = Kept(machine, tmp_path / "disk.img")
        for _ in range(20):
            wait_for_rounds(machine, 60)
            kept.put_back()
            assert not machine.is_paused
        wait_for_rounds(machine, 60)
        assert machine.pause(patient(WAIT_S))
        kept.put_back()
        assert machine.is_paused
        assert not machine.runner.is_quiesced
        machine.resume()
        wait_for_rounds(machine, ROUNDS)
        machine.stop(STOPPED)


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_machine_that_has_ended_goes_on_from_before(tmp_path: Path, cpus: int) -> None:
    threads = threading.active_count()
    config = disk_machine(tmp_path, rounds=ROUNDS, cpus=cpus)
    disk = tmp_path / "disk.img"
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, 20)
        kept = Kept(machine, disk)
        over: list[str] = []
        for _ in range(5):
            machine.resume()
            wait_for_rounds(machine, ROUNDS)
            assert machine.consoles.receive(b"!") == 1
            assert machine.wait(patient(WAIT_S)) == DONE
            assert disk.read_bytes() == expected_disk(ROUNDS)
            kept.put_back(lambda _: machine.runner.when_over(lambda: over.append("over")))
            assert machine.is_paused
            assert machine.wait(0.0) is None, "it has no outcome any more"
            assert rounds_done(machine) < ROUNDS
        assert over == ["over"] * 4
        machine.resume()
        wait_for_rounds(machine, ROUNDS // 2)
        assert machine.stop(STOPPED) == STOPPED
        kept.put_back()
        machine.resume()
        wait_for_rounds(machine, ROUNDS)
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE
    assert threading.active_count() == threads
