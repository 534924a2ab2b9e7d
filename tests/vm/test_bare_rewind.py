"""A whole machine returns to its checkpoints, while its guest drives a disk and after its end."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from uuid import UUID

import pytest

from pyvmm.config import DiskConfig, RunConfig
from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.checkpoints import Checkpoints, checkpoints_of
from pyvmm.snapshot.still import still
from pyvmm.storage.open import DiskSource
from pyvmm.virtio.block import BlockDevice
from tests.support.disk_guest import (
    SECTORS,
    built,
    disk_machine,
    expected_disk,
    read_memory,
    rounds_done,
    wait_for_rounds,
)
from tests.support.patience import patient
from tests.support.vhost_user_peers import open_fds
from tests.vm.test_bare_save import comparable

pytestmark = pytest.mark.bare

ROUNDS = 300
STOPPED = Outcome(Kind.STOPPED)
DONE = Outcome(Kind.GUEST_STATUS, 0)
WAIT_S = 30.0


def rewindable(folder: Path, **how: object) -> RunConfig:
    """``disk_machine`` with a disk that nobody writes in place."""
    serve = how.pop("serve", "thread")
    config = disk_machine(folder, rounds=ROUNDS, **how)  # type: ignore[arg-type]
    source = DiskSource(location=str(folder / "disk.img"), snapshot=True)
    return config.replace(disks=(DiskConfig(source=source),), serve=serve)


def disk_content(machine: Machine) -> bytes:
    """Return what the guest's disk holds; the machine must be still."""
    device = machine.board.slots[0].device
    assert isinstance(device, BlockDevice)
    content = bytearray(SECTORS * 512)
    device.disk.readv([memoryview(content)], 0)
    return bytes(content)


def check_disk(machine: Machine) -> None:
    """The disk is that of the rounds done, or has the one under way besides."""
    done = rounds_done(machine)
    assert disk_content(machine) in (expected_disk(done), expected_disk(done + 1))


def finish(machine: Machine) -> None:
    """Let the guest do its rounds; it compares what it reads with what it wrote."""
    wait_for_rounds(machine, ROUNDS)
    assert machine.consoles.receive(b"!") == 1
    assert machine.wait(patient(WAIT_S)) == DONE


@pytest.mark.parametrize("serve", ["thread", "exit"])
@pytest.mark.parametrize("mmio", ["mapped", "trapped"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("cpus", [1, 3, 8])
def test_a_machine_returns_to_each_of_its_checkpoints(
    tmp_path: Path, cpus: int, packed: bool, mmio: str, serve: str
) -> None:
    config = rewindable(tmp_path, cpus=cpus, packed=packed, mmio=mmio, serve=serve)
    with built(config) as machine:
        machine.start()
        moments = checkpoints_of(machine)
        kept: dict[int, tuple[dict[str, object], list[bytes], bytes]] = {}
        for goal in (20, 60, 100):
            wait_for_rounds(machine, goal)
            assert machine.quiesce(patient(WAIT_S))  # in a pause, devices would go on
            before = read_memory(machine), disk_content(machine)
            number = moments.take()
            kept[number] = machine.save(), *before
            assert (read_memory(machine), disk_content(machine)) == before
            machine.resume()
        assert moments.numbers == tuple(kept)
        for number in reversed(kept):
            wait_for_rounds(machine, 150)
            moments.rewind(number)
            was_running = not machine.is_paused
            assert machine.quiesce(patient(WAIT_S))
            moments.rewind(number)
            assert (was_running, machine.runner.is_quiesced) == (True, True)
            state, memory, disk = kept[number]
            assert disk_content(machine) == disk
            assert differing_pages(read_memory(machine), memory) <= 1, "the generation ID"
            assert comparable_rewound(machine.save()) == comparable_rewound(state)
            assert moments.numbers[-1] == number
            machine.resume()
        finish(machine)


def differing_pages(one: list[bytes], other: list[bytes]) -> int:
    """The number of pages in which two copies of RAM differ."""
    return sum(
        left[at : at + 4096] != right[at : at + 4096]
        for left, right in zip(one, other, strict=True) if left != right
        for at in range(0, len(left), 4096)
    )


def comparable_rewound(state: dict[str, object]) -> dict[str, object]:
    """``state`` without what differs in a rewound machine: clocks, and interrupts of catching up.
    """
    state = comparable(state)
    vcpus, board = state["vcpus"], state["board"]
    assert isinstance(vcpus, dict)
    assert isinstance(board, dict)
    parts = {k: v for k, v in board["parts"].items() if k != "VM generation ID"}
    for vcpu in vcpus.values():
        lapic = bytearray(vcpu["lapic"])
        lapic[0x200:0x280] = bytes(0x80)  # IRR
        lapic[0x390:0x394] = bytes(4)  # the timer counts
        vcpu["lapic"] = bytes(lapic)
    return {"vcpus": vcpus, "board": board | {"parts": parts}}


def test_twenty_rewinds_under_disk_load_leave_the_disk_of_the_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(14)
    before, threads = open_fds(), threading.active_count()
    with built(rewindable(tmp_path)) as machine:
        machine.start()
        moments = checkpoints_of(machine)
        wait_for_rounds(machine, 10)
        moments.take()
        for _ in range(20):
            goal = rounds_done(machine) + chance.randrange(5, 40)
            wait_for_rounds(machine, min(goal, ROUNDS))
            if chance.random() < 0.5:
                moments.take()
            number = chance.choice(moments.numbers)
            moments.rewind(number)
            with still(machine, "a test"):
                check_disk(machine)
        finish(machine)
        moments.rewind(moments.numbers[0])
        assert machine.is_paused
        machine.resume()
        finish(machine)
    assert (tmp_path / "disk.img").read_bytes() == bytes(SECTORS * 512), "nobody wrote it"
    assert open_fds() == before
    assert threading.active_count() == threads


@pytest.mark.parametrize("cpus", [1, 2])
def test_an_ended_machine_goes_on_from_a_checkpoint(tmp_path: Path, cpus: int) -> None:
    with built(rewindable(tmp_path, cpus=cpus)) as machine:
        machine.start()
        wait_for_rounds(machine, 20)
        moments = checkpoints_of(machine)
        moments.take()
        for _ in range(3):
            finish(machine)
            moments.rewind()
            assert machine.is_paused
            assert machine.wait(0.0) is None
            check_disk(machine)
            machine.resume()
        machine.stop(STOPPED)
        moments.rewind()
        machine.resume()
        finish(machine)


def test_the_oldest_checkpoints_make_room_and_are_counted(tmp_path: Path) -> None:
    with built(rewindable(tmp_path)) as machine:
        machine.start()
        moments = Checkpoints(machine, max_count=3)
        for goal in range(10, 60, 10):
            wait_for_rounds(machine, goal)
            moments.take()
        assert list(moments.numbers) == [3, 4, 5]
        assert moments.dropped == 2
        with pytest.raises(SnapshotError, match=r"^checkpoint 2: is not held; there are 3 to 5$"):
            moments.rewind(2)
        moments.rewind(3)
        assert list(moments.numbers) == [3]
        finish(machine)
        moments.close()


def test_a_limit_of_bytes_drops_the_oldest_checkpoints(tmp_path: Path) -> None:
    with built(rewindable(tmp_path)) as machine:
        machine.start()
        moments = Checkpoints(machine, max_bytes=64 << 10)
        for goal in range(10, 200, 10):
            wait_for_rounds(machine, goal)
            moments.take()
        assert moments.dropped > 0
        assert moments.held_bytes <= 64 << 10
        assert len(moments.numbers) + moments.dropped == 19
        moments.rewind()
        finish(machine)
        moments.close()


def test_every_rewind_makes_another_clone(tmp_path: Path) -> None:
    with built(rewindable(tmp_path)) as machine:
        machine.start()
        wait_for_rounds(machine, 10)
        moments = checkpoints_of(machine)
        moments.take()
        assert machine.clone_id is None
        seen: set[UUID | None] = set()
        for _ in range(3):
            moments.rewind()
            seen.add(machine.clone_id)
            assert machine.board.vmgenid.value == machine.clone_id
        assert len(seen) == 3
        machine.stop(STOPPED)


# Bad use


def test_a_machine_without_a_moment_to_return_to_says_so(tmp_path: Path) -> None:
    with built(rewindable(tmp_path)) as machine:
        moments = checkpoints_of(machine)
        with pytest.raises(SnapshotError, match=r"no checkpoint and no snapshot"):
            moments.rewind()
        with pytest.raises(SnapshotError, match=r"^checkpoint 1: is not held; there are none$"):
            moments.rewind(1)


def test_a_disk_that_is_written_in_place_is_refused_before_the_guest_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with built(disk_machine(tmp_path, rounds=ROUNDS)) as machine:
        machine.start()
        monkeypatch.setattr(type(machine.runner), "hold", lambda *_: pytest.fail("held"))
        with pytest.raises(SnapshotError, match="is written in place"):
            checkpoints_of(machine).take()
        machine.stop(STOPPED)


def test_a_closed_machine_is_not_rewound(tmp_path: Path) -> None:
    with built(rewindable(tmp_path)) as machine:
        machine.start()
        moments = checkpoints_of(machine)
        moments.take()
        machine.stop(STOPPED)
        with pytest.raises(SnapshotError, match=r"^checkpoint\(\): the run is over$"):
            moments.take()
    for use in (moments.rewind, moments.take, lambda: checkpoints_of(machine)):
        with pytest.raises((RuntimeError, SnapshotError), match=r"closed|no checkpoint"):
            use()
