"""Snapshots of machines whose guests drive a disk, and clones that go on from them."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyvmm.errors import SnapshotError
from pyvmm.kvm.abi import KVM_MP_STATE_HALTED
from pyvmm.machine import Machine
from pyvmm.report import Reporter
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.checkpoints import checkpoints_of
from pyvmm.snapshot.opening import open_snapshot
from pyvmm.snapshot.snapshot import Snapshot
from pyvmm.virtio.rate_limit import RateLimit
from tests.support.disk_guest import (
    built,
    expected_disk,
    rounds_done,
    wait_for_rounds,
)
from tests.support.patience import patient
from tests.support.snapshots import (
    DONE,
    STOPPED,
    Resources,
    at_rounds,
    clone_of,
    comparable_machine,
    ending,
    finish,
    read_disk,
    snapshot_machine,
)
from tests.support.virtio_states import assert_plain

pytestmark = pytest.mark.bare

ROUNDS = 300
WAIT_S = 30.0


def is_paused(machine: Machine) -> bool:
    return machine.is_paused


@pytest.mark.parametrize("place", ["in memory", "in a directory"])
@pytest.mark.parametrize("serve", ["thread", "exit"])
@pytest.mark.parametrize("mmio", ["mapped", "trapped"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_goes_on_in_clones_and_in_the_original(
    tmp_path: Path, packed: bool, mmio: str, serve: str, place: str
) -> None:
    config = snapshot_machine(tmp_path, rounds=ROUNDS, packed=packed, mmio=mmio, serve=serve)
    directory = tmp_path / "saved" if place == "in a directory" else None
    with ending(built(config)) as machine:
        at_rounds(machine, 20)
        snapshot = take(machine, directory)
        assert not is_paused(machine)
        for _ in range(2):
            with ending(clone_of(snapshot)) as clone:
                assert comparable_machine(clone.save()) == comparable_machine(snapshot.facts.state)
                assert rounds_done(clone) >= 20
                finish(clone, ROUNDS)
        finish_running(machine)
    snapshot.close()
    if directory is not None:
        opened = open_snapshot(directory, report=Reporter())
        with opened, ending(clone_of(opened)) as clone:
            assert_plain(opened.facts.state)
            assert comparable_machine(clone.save()) == comparable_machine(opened.facts.state)
            finish(clone, ROUNDS)
    assert (tmp_path / "disk.img").read_bytes() == bytes(len(expected_disk(0)))


def finish_running(machine: Machine) -> None:
    """Let a machine that runs go to its end."""
    wait_for_rounds(machine, ROUNDS)
    assert machine.consoles.receive(b"!") == 1
    outcome = machine.wait(patient(WAIT_S))
    assert outcome is not None
    assert outcome.exit_status == 0
    assert read_disk(machine) == expected_disk(ROUNDS)


def test_typed_bytes_in_the_uart_are_the_clones_too(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        at_rounds(machine, 20)
        assert machine.consoles.receive(b"typed") == 5  # into the FIFO: the line goes up
        with take(machine) as snapshot:
            machine.stop(STOPPED)
            for name in ("one", "two"):
                path = tmp_path / name
                with snapshot.clone(console=str(path), report=Reporter()) as clone:
                    clone.start()
                    assert clone.wait(patient(WAIT_S)) == DONE
                assert path.read_bytes() == b"typed"


@pytest.mark.parametrize("cpus", [2, 5, 8])
def test_machines_of_several_vcpus_are_cloned(tmp_path: Path, cpus: int) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS, cpus=cpus))) as machine:
        at_rounds(machine, 20)
        with take(machine) as snapshot:
            machine.stop(STOPPED)
            with ending(clone_of(snapshot)) as clone:
                finish(clone, ROUNDS)


def test_a_clone_of_a_clone_of_a_clone_goes_on(tmp_path: Path) -> None:
    machine = built(snapshot_machine(tmp_path, rounds=ROUNDS))
    kept = []
    for stop_at in (20, 90, 170):
        at_rounds(machine, stop_at)
        kept.append(take(machine))
        machine.stop(STOPPED)
        clone = clone_of(kept[-1])
        machine.close()
        machine = clone
    with machine:
        finish(machine, ROUNDS)
    for snapshot in kept:  # each of the older ones is as it was
        with snapshot, ending(clone_of(snapshot)) as clone:
            finish(clone, ROUNDS)


def test_a_machine_that_has_not_started_is_cloned(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=3))) as machine:
        snapshot = take(machine)
        finish(machine, 3)
    with snapshot, ending(clone_of(snapshot)) as clone:
        with take(clone) as again, ending(clone_of(again)) as second:
            finish(second, 3)
        finish(clone, 3)


# The state of the machine around a snapshot


@pytest.mark.parametrize("live", [False, True])
def test_a_paused_machine_stays_paused_and_a_running_one_runs(tmp_path: Path, live: bool) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=1 << 30))) as machine:
        at_rounds(machine, 20)
        take(machine, live=live).close()
        assert not is_paused(machine)
        wait_for_rounds(machine, rounds_done(machine) + 2)
        assert machine.pause(patient(WAIT_S))
        take(machine, live=live).close()
        assert is_paused(machine)
        assert not machine.runner.is_quiesced
        assert machine.quiesce(patient(WAIT_S))
        before = rounds_done(machine)
        take(machine, live=live).close()
        time.sleep(0.05)
        assert machine.runner.is_still
        assert rounds_done(machine) == before
        machine.resume()
        wait_for_rounds(machine, before + 2)


def test_resume_in_the_midst_of_a_snapshot_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=1 << 30))) as machine:
        at_rounds(machine, 20)
        save = machine.save

        def resumed_meanwhile() -> dict[str, object]:
            before = rounds_done(machine)
            other = threading.Thread(target=machine.resume)
            other.start()
            other.join()
            time.sleep(0.05)
            assert rounds_done(machine) == before
            return save()

        monkeypatch.setattr(machine, "save", resumed_meanwhile)
        assert machine.pause(patient(WAIT_S))
        with take(machine) as snapshot:
            monkeypatch.undo()
            assert not is_paused(machine), "the other thread's wish"
            wait_for_rounds(machine, rounds_done(machine) + 2)
            with ending(clone_of(snapshot)) as clone:
                wait_for_rounds(at_rounds(clone, 1), rounds_done(clone) + 2)


def test_a_guest_goes_on_after_a_save_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with ending(built(snapshot_machine(tmp_path, rounds=1 << 30))) as machine:
        at_rounds(machine, 20)
        with monkeypatch.context() as patch:
            patch.setattr("pyvmm.snapshot.writing.write_ram", refuse)
            with pytest.raises(SnapshotError, match=r"saved/ram: cannot be written: No space left"):
                take(machine, tmp_path / "saved")
        assert sorted(path.name for path in tmp_path.glob("saved*")) == []
        assert not is_paused(machine)
        wait_for_rounds(machine, rounds_done(machine) + 2)
        with take(machine, tmp_path / "saved") as snapshot, ending(clone_of(snapshot)) as clone:
            wait_for_rounds(at_rounds(clone, 1), rounds_done(clone) + 2)


@pytest.mark.parametrize("directory", [None, "saved"])
def test_a_live_snapshot_has_ram_as_it_was_when_the_guest_went_on(
    tmp_path: Path, directory: str | None
) -> None:
    place = None if directory is None else tmp_path / directory
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        at_rounds(machine, 20)
        with take(machine, place, live=True) as snapshot:
            assert snapshot.facts.is_live
            with ending(clone_of(snapshot)) as clone:
                assert rounds_done(clone) < ROUNDS
                finish(clone, ROUNDS)
        finish_running(machine)


def test_a_run_that_ends_in_the_midst_of_a_snapshot_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=1 << 30))) as machine:
        at_rounds(machine, 20)
        save = machine.save

        def ended_meanwhile() -> dict[str, object]:
            machine.runner.finish(DONE)
            until_s = time.monotonic() + patient(WAIT_S)
            while not machine.runner.is_over:
                assert time.monotonic() < until_s
                time.sleep(0.001)
            return save()

        monkeypatch.setattr(machine, "save", ended_meanwhile)
        with pytest.raises(SnapshotError, match=r"^snapshot\(\): the run has ended meanwhile$"):
            take(machine, tmp_path / "saved")
        assert list(tmp_path.glob("saved*")) == []
        assert machine.wait(patient(WAIT_S)) == DONE


def test_a_machine_that_is_saved_often_does_not_grow(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=1 << 30))) as machine:
        at_rounds(machine, 20)
        counts = []
        for _ in range(40):
            take(machine).close()
            wait_for_rounds(machine, rounds_done(machine) + 2)
            counts.append(len(Resources.now().descriptors))
        assert max(counts[20:]) <= max(counts[:20])


# The end of all, in any order

STEPS = ("snapshot", "snapshot", "clone", "clone", "close", "drop", "checkpoint", "rewind")


@given(data=st.data())
@settings(
    suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=15,
    phases=[Phase.explicit, Phase.generate],  # shrinking would boot guests for minutes
)
def test_any_order_of_clones_snapshots_and_ends_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("order")
    config = snapshot_machine(
        folder, rounds=ROUNDS,
        packed=data.draw(st.booleans(), "packed"),
        cpus=data.draw(st.sampled_from([1, 2]), "cpus"),
        mmio=data.draw(st.sampled_from(["mapped", "trapped"]), "mmio"),
        serve=data.draw(st.sampled_from(["thread", "exit"]), "serve"),
    )
    before = Resources.now()
    machines, snapshots, number = [built(config)], list[Snapshot](), 0
    at_rounds(machines[0], 10)
    for _ in range(data.draw(st.integers(1, 10), "steps")):
        step = data.draw(st.sampled_from(STEPS), "step")
        if step == "snapshot" and machines:
            number += 1
            directory = folder / f"{number}" if data.draw(st.booleans(), "in a directory") else None
            machine = data.draw(st.sampled_from(machines), "machine")
            snapshots.append(take(machine, directory, live=data.draw(st.booleans(), "live")))
        elif step == "clone" and snapshots:
            machines.append(clone_of(data.draw(st.sampled_from(snapshots), "of")))
            at_rounds(machines[-1], min(ROUNDS, rounds_done(machines[-1]) + 5))
        elif step == "close" and machines:
            machine = machines.pop(data.draw(st.integers(0, len(machines) - 1), "which"))
            machine.stop(STOPPED)
            machine.close()
        elif step == "checkpoint" and machines:
            checkpoints_of(data.draw(st.sampled_from(machines), "machine")).take()
        elif step == "rewind" and machines:
            with contextlib.suppress(SnapshotError):  # there may be nothing to go back to
                checkpoints_of(data.draw(st.sampled_from(machines), "machine")).rewind()
        elif step == "drop" and snapshots:
            snapshots.pop(data.draw(st.integers(0, len(snapshots) - 1), "which")).close()
    for machine in machines:
        finish_running(machine)
        machine.close()
    for snapshot in snapshots:
        snapshot.close()
    assert Resources.now() == before


def test_a_hundred_clones_at_once_leave_nothing(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        at_rounds(machine, 20)
        before = Resources.now()
        snapshot = take(machine)
        clones = [clone_of(snapshot) for _ in range(100)]
        for clone in clones:
            clone.start()
        snapshot.close()
        for clone in clones:
            wait_for_rounds(clone, ROUNDS)
        assert len({clone.clone_id for clone in clones}) == 100
        for clone in clones:
            assert read_disk_of_ended(clone) == expected_disk(ROUNDS)
            clone.close()
        assert Resources.now().without_image() == before.without_image()


def test_clones_of_clones_are_made_by_many_threads_at_once(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(2):
                with ending(clone_of(snapshot)) as clone:
                    at_rounds(clone, rounds_done(clone) + 50)
                    with take(clone) as own, ending(clone_of(own)) as second:
                        finish(second, ROUNDS)
        except BaseException as error:
            errors.append(error)

    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        at_rounds(machine, 20)
        with take(machine) as snapshot:
            before = Resources.now()
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
            assert Resources.now() == before


def read_disk_of_ended(machine: Machine) -> bytes:
    machine.stop(STOPPED)
    return read_disk(machine)


# A guest in the midst of something


def test_a_guest_that_waits_in_hlt_is_woken_in_its_clone(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=20))) as machine:
        at_rounds(machine, 20)  # and waits for a typed byte, halted
        until_s = time.monotonic() + patient(WAIT_S)
        while True:
            with take(machine) as snapshot:
                state = snapshot.facts.state["vcpus"]
                assert isinstance(state, dict)
                if state["vcpu0"]["mp_state"] == KVM_MP_STATE_HALTED:
                    with ending(clone_of(snapshot)) as clone:
                        finish(clone, 20)
                    break
            assert time.monotonic() < until_s


@pytest.mark.parametrize("serve", ["thread", "exit"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_request_that_waits_for_its_turn_is_served_in_the_clone(
    tmp_path: Path, packed: bool, serve: str
) -> None:
    config = snapshot_machine(tmp_path, rounds=60, packed=packed, serve=serve)
    slow = config.disks[0].replace(rate_limit=RateLimit(ops_per_s=200, ops_burst=1))
    with ending(built(config.replace(disks=(slow,)))) as machine:
        at_rounds(machine, 5)
        snapshots = [take(machine) for _ in range(5)]  # nearly always a request waits
        for snapshot in snapshots:
            with snapshot, ending(clone_of(snapshot)) as clone:
                finish(clone, 60)
        wait_for_rounds(machine, 60)
