"""A whole machine saved while its guest drives a disk, and another one that goes on from there."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pyvmm.config import DiskConfig, RunConfig
from pyvmm.errors import StateError
from pyvmm.kvm.handles import Vcpu, Vm
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.x86 import layout
from tests.support.disk_guest import (
    built,
    disk_machine,
    expected_disk,
    read_memory,
    rounds_done,
    wait_for_rounds,
    write_memory,
)
from tests.support.kvm_states import comparable_chips, comparable_vcpu
from tests.support.patience import patient
from tests.support.snapshots import stop_and_save
from tests.support.vhost_user_peers import open_fds
from tests.support.virtio_states import assert_plain

pytestmark = pytest.mark.bare

ROUNDS, STOPS = 300, (20, 90, 170, 250)
AVAIL_IDX, USED_IDX = 0x401002, 0x402002  # of drive_disk.S's split ring
STOPPED = Outcome(Kind.STOPPED)
DONE = Outcome(Kind.GUEST_STATUS, 0)
WAIT_S = 30.0


def comparable(state: dict[str, object]) -> dict[str, object]:
    """``state`` without what the documentation says goes on: TSC, clocks, PIT load times."""
    vcpus, chips = state["vcpus"], state["chips"]
    assert isinstance(vcpus, dict)
    assert isinstance(chips, dict)
    return state | {
        "vcpus": {name: comparable_vcpu(one) for name, one in vcpus.items()},
        "chips": comparable_chips(chips),
        "realtime_ns": None, "clock_ns": None, "tsc": None,
    }


@pytest.mark.parametrize("mmio", ["mapped", "trapped"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_machine_goes_on_in_another_one_again_and_again(
    tmp_path: Path, cpus: int, packed: bool, mmio: str
) -> None:
    config = disk_machine(tmp_path, rounds=ROUNDS, packed=packed, cpus=cpus, mmio=mmio)
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, STOPS[0])
        assert machine.consoles.receive(b"typed") == 5  # into the FIFO: the line goes up
        state, memory = stop_and_save(machine)
    for stop_at in STOPS[1:]:
        assert_plain(state)
        with built(config) as machine:
            write_memory(machine, memory)
            machine.restore(state)
            assert comparable(machine.save()) == comparable(state)
            assert read_memory(machine) == memory, "RAM is the caller's"
            machine.start()
            wait_for_rounds(machine, stop_at)
            state, memory = stop_and_save(machine)
    with built(config) as machine:
        write_memory(machine, memory)
        machine.restore(state)
        machine.start()
        assert machine.wait(patient(WAIT_S)) == DONE
    assert Path(config.console).read_bytes() == b"typed"
    assert (tmp_path / "disk.img").read_bytes() == expected_disk(ROUNDS)


def test_the_port_of_an_agent_goes_with_the_machine(tmp_path: Path) -> None:
    config = disk_machine(tmp_path, rounds=20).replace(agent="image")
    with built(config) as machine:
        assert [slot.name for slot in machine.board.slots][-1] == "agent"
        assert machine.agent_port is machine.board.slots[-1].device
        machine.start()
        wait_for_rounds(machine, 5)
        state, memory = stop_and_save(machine)
    with built(config.replace(agent="none")) as machine:
        assert machine.agent_port is None
        with pytest.raises(StateError, match="agent"):
            machine.restore(state)
    with built(config) as machine:
        write_memory(machine, memory)
        machine.restore(state)
        assert comparable(machine.save()) == comparable(state)
        machine.start()
        wait_for_rounds(machine, 20)
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE


def test_a_machine_that_was_saved_goes_on_itself(tmp_path: Path) -> None:
    config = disk_machine(tmp_path, rounds=ROUNDS)
    with built(config) as machine:
        machine.start()
        for stop_at in STOPS:
            wait_for_rounds(machine, stop_at)
            assert machine.quiesce(patient(WAIT_S))
            machine.save()
            machine.resume()
        wait_for_rounds(machine, ROUNDS)
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE
    assert (tmp_path / "disk.img").read_bytes() == expected_disk(ROUNDS)


def test_who_resumes_a_machine_while_it_is_saved_is_obeyed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with built(disk_machine(tmp_path, rounds=ROUNDS)) as machine:
        machine.start()
        wait_for_rounds(machine, STOPS[0])
        assert machine.quiesce(patient(WAIT_S))
        save, before = Vm.save, rounds_done(machine)

        def resumed_meanwhile(vm: Vm) -> dict[str, object]:
            other = threading.Thread(target=machine.resume)
            other.start()
            other.join()
            time.sleep(0.05)
            assert rounds_done(machine) == before
            return save(vm)

        with monkeypatch.context() as patch:
            patch.setattr(Vm, "save", resumed_meanwhile)
            state = machine.save()
        wait_for_rounds(machine, ROUNDS)
        assert not machine.is_paused
        assert sorted(state) == ["board", "chips", "clock_ns", "realtime_ns", "tsc", "vcpus"]
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE


def test_a_machine_that_has_not_started_is_saved_too(tmp_path: Path) -> None:
    config = disk_machine(tmp_path, rounds=2)
    with built(config) as machine:
        state, memory = machine.save(), read_memory(machine)
    with built(config) as machine:
        write_memory(machine, memory)
        machine.restore(state)
        machine.start()
        wait_for_rounds(machine, 2)
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE


def finish_in_another(
    config: RunConfig, state: dict[str, object], memory: list[bytes], rounds: int
) -> None:
    """Have another machine do the rest of its rounds."""
    with built(config) as machine:
        write_memory(machine, memory)
        machine.restore(state)
        machine.start()
        wait_for_rounds(machine, rounds)
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE


def test_a_request_that_a_rate_limit_held_is_served_after_the_restore(tmp_path: Path) -> None:
    """Its doorbell was rung before the save, and nobody's state has that."""
    config = disk_machine(tmp_path, rounds=6)
    disk = config.disks[0]
    assert isinstance(disk, DiskConfig)
    config = config.replace(disks=(disk.replace(rate_limit=RateLimit(ops_per_s=5)),))
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, 1)
        ram = machine.board.memory
        assert machine.quiesce(patient(WAIT_S))
        while ram.read_int(AVAIL_IDX, 2) == ram.read_int(USED_IDX, 2):
            machine.resume()
            time.sleep(0.01)
            assert machine.quiesce(patient(WAIT_S))
        state, memory = stop_and_save(machine)
    finish_in_another(config, state, memory, 6)


def test_an_interrupt_that_is_in_nobodys_state_is_sent_after_the_restore(tmp_path: Path) -> None:
    config = disk_machine(tmp_path, rounds=ROUNDS)
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, STOPS[0])
        slot = machine.board.slots[0]
        # From here on an interrupt gets no further than the eventfd.
        machine.vm.irqfd(slot.irq_fd, slot.gsi, deassign=True)
        before = -1
        while rounds_done(machine) != before:
            before = rounds_done(machine)
            time.sleep(0.2)
        assert before < ROUNDS
        state, memory = stop_and_save(machine)
    finish_in_another(config, state, memory, ROUNDS)


def test_a_restored_guest_is_told_of_its_pause_and_its_uarts_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = disk_machine(tmp_path, rounds=ROUNDS, cpus=2)
    with built(config) as machine:
        machine.start()
        wait_for_rounds(machine, STOPS[0])
        assert machine.consoles.receive(b"typed") == 5
        state, memory = stop_and_save(machine)
    lines: list[tuple[int, bool]] = []
    paused: list[int] = []
    monkeypatch.setattr(Vm, "irq_line", lambda _vm, gsi, level: lines.append((gsi, level)))
    monkeypatch.setattr(Vcpu, "note_pause", lambda vcpu: paused.append(vcpu.index))
    with built(config) as machine:
        write_memory(machine, memory)
        machine.restore(state)
        assert (lines, paused) == ([], []), "nothing happens in the guest before the start"
        machine.start()
        assert lines[0] == (layout.SERIAL_IRQ, True)
        assert paused[:2] == [0, 1]
        machine.stop(STOPPED)


def test_what_the_guest_has_shown_of_itself_comes_along(tmp_path: Path) -> None:
    config = disk_machine(tmp_path, rounds=ROUNDS)
    with built(config) as first:
        first.evidence.reached_init = first.evidence.has_printed = True
        first.evidence.mount_error = "no such disk"
        state = first.save()
    with built(config) as second:
        second.restore(state)
        assert vars(second.evidence) == vars(first.evidence)


def test_every_device_on_a_bus_that_has_a_state_is_saved(tmp_path: Path) -> None:
    with built(disk_machine(tmp_path, rounds=1)) as machine:
        board = machine.board
        saved: list[object] = [*board.parts.values(), *(slot.transport for slot in board.slots)]
        found = [
            device for bus in (board.pio, board.mmio) for _, _, device in bus._table.values()
            if hasattr(device, "save")
        ]
        assert len(found) > 8
        assert [device for device in found if device not in saved] == []
        state = machine.save()
    assert sorted(state) == ["board", "chips", "clock_ns", "realtime_ns", "tsc", "vcpus"]
    on_board = state["board"]
    assert isinstance(on_board, dict)
    assert list(on_board["slots"]) == ["virtio0", "console", "entropy"]
    assert sorted(on_board["parts"]) == [
        "PCI host bridge", "RTC", "VM generation ID", "boot timer", "console watch", "debug exit",
        "hvc0", "i8042", "power", "pvpanic", "serial", "verdict",
    ]


def test_a_device_of_ones_own_is_saved_by_its_name(tmp_path: Path) -> None:
    config = disk_machine(tmp_path, rounds=2)
    with built(config, chance=EntropyDevice()) as machine:
        machine.start()
        wait_for_rounds(machine, 2)
        state, memory = stop_and_save(machine)
    with (
        built(config) as machine,
        pytest.raises(StateError, match=r"^slots: has no field 'chance'$"),
    ):
        machine.restore(state)
    with built(config, chance=EntropyDevice()) as machine:
        write_memory(machine, memory)
        machine.restore(state)
        machine.start()
        assert machine.consoles.receive(b"!") == 1
        assert machine.wait(patient(WAIT_S)) == DONE


# Bad input


def test_a_machine_that_moves_is_not_saved(tmp_path: Path) -> None:
    with built(disk_machine(tmp_path, rounds=ROUNDS)) as machine:
        machine.start()
        with pytest.raises(RuntimeError, match=r"^save\(\) needs a machine that is quiesced"):
            machine.save()
        assert machine.pause(patient(WAIT_S))
        with pytest.raises(RuntimeError, match=r"^save\(\) needs a machine that is quiesced"):
            machine.save()  # its disk's thread goes on
        assert machine.quiesce(patient(WAIT_S))
        state = machine.save()
        with pytest.raises(RuntimeError, match=r"^restore\(\) comes before start\(\) and run\(\)"):
            machine.restore(state)
        machine.stop(STOPPED)
        with pytest.raises(RuntimeError, match=r"^save\(\) needs a machine that is quiesced"):
            machine.save()
    for use in (machine.save, lambda: machine.restore(state)):
        with pytest.raises(RuntimeError, match=r"closed|comes before"):
            use()


def test_a_closed_machine_takes_no_state(tmp_path: Path) -> None:
    before = open_fds()
    with built(disk_machine(tmp_path, rounds=1)) as machine:
        state = machine.save()
    with pytest.raises(RuntimeError, match=r"^save\(\) needs an open machine: this one was closed"):
        machine.save()
    with pytest.raises(RuntimeError, match=r"^restore\(\) needs an open machine"):
        machine.restore(state)
    assert open_fds() == before
