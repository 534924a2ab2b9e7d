"""States of a whole machine that somebody has spoilt: each is one error, or accepted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import StateError
from pyvmm.machine import Machine
from pyvmm.run.outcome import Kind, Outcome
from tests.support.disk_guest import (
    built,
    disk_machine,
    expected_disk,
    wait_for_rounds,
    write_memory,
)
from tests.support.patience import patient
from tests.support.snapshots import stop_and_save
from tests.support.virtio_states import junk, replaced, walk, without

pytestmark = pytest.mark.bare

ROUNDS, STOPS = 300, (20, 90, 170, 250)
STOPPED = Outcome(Kind.STOPPED)
DONE = Outcome(Kind.GUEST_STATUS, 0)
WAIT_S = 30.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, object], Machine]]:
    """The state of a machine in the midst of its work, and another that takes bad ones."""
    config = disk_machine(tmp_path_factory.mktemp("saved"), rounds=ROUNDS, cpus=2)
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, STOPS[0])
        state, memory = stop_and_save(machine)
    with built(config) as machine:
        write_memory(machine, memory)
        yield state, machine


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (("vcpus", "vcpu1"), r"^vcpus: vcpu1 is missing$"),
        (("chips",), r"^machine: chips is missing$"),
        (("board", "parts"), r"^board: parts is missing$"),
        (("board", "parts", "i8042"), r"^parts: i8042 is missing$"),
        (("board", "slots", "virtio0"), r"^slots: virtio0 is missing$"),
        (("board", "slots", "virtio0", "gsi"), r"^slot virtio0: gsi is missing$"),
    ],
)
def test_a_missing_name_is_one_state_error(
    saved: tuple[dict[str, object], Machine], path: tuple[str, ...], problem: str
) -> None:
    state, machine = saved
    with pytest.raises(StateError, match=problem):
        machine.restore(without(state, path))


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ((), [], r"^machine: the state is no dict with text keys$"),
        (("ram",), b"", r"^machine: has no field 'ram'$"),
        (("vcpus", "vcpu2"), {}, r"^vcpus: has no field 'vcpu2'$"),
        (("board", "parts", "floppy"), {}, r"^parts: has no field 'floppy'$"),
        (("board", "slots", "virtio1"), {}, r"^slots: has no field 'virtio1'$"),
        (("board", "slots", "virtio0", "base"), 0xD000_1000, r"^slot virtio0: base is not 0xd0000"),
        (("board", "parts", "verdict", "panic"), 5, r"^verdict: panic is not None or a text"),
        (("board", "parts", "hvc0", "held"), "", r"^hvc0: held is not 0 to 65536 bytes$"),
        (("board", "slots", "virtio0", "transport", "status"), 999,
         r"^virtio block device, transport: status is not an integer of 0 to 255$"),
    ],
)
def test_a_name_or_a_value_too_many_is_one_state_error(
    saved: tuple[dict[str, object], Machine], path: tuple[str, ...], value: object, problem: str
) -> None:
    state, machine = saved
    with pytest.raises(StateError, match=problem):
        machine.restore(replaced(state, path, value))


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_spoilt_state_is_a_state_error_or_accepted(
    saved: tuple[dict[str, object], Machine], data: st.DataObject
) -> None:
    state, machine = saved
    path = data.draw(st.sampled_from([path for path, _ in walk(state)]), "path")
    if data.draw(st.booleans(), "removed"):
        spoilt = without(state, path)
    else:
        spoilt = replaced(state, path, data.draw(junk, "junk"))
    with contextlib.suppress(StateError):
        machine.restore(spoilt)


def test_a_machine_whose_state_was_refused_does_not_start_until_it_has_a_good_one(
    tmp_path: Path,
) -> None:
    config = disk_machine(tmp_path, rounds=ROUNDS)
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, STOPS[0])
        state, memory = stop_and_save(machine)
    with built(config) as machine:
        write_memory(machine, memory)
        with pytest.raises(StateError):
            machine.restore(without(state, ("board", "slots", "entropy")))
        for start in (machine.start, machine.run):
            with pytest.raises(RuntimeError, match=r"^restore\(\) has failed: give the machine"):
                start()
        machine.restore(state)
        machine.start()
        wait_for_rounds(machine, ROUNDS)
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE
    assert (tmp_path / "disk.img").read_bytes() == expected_disk(ROUNDS)
