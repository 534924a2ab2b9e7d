"""``pyvmm.Snapshot`` from a script: bare guests that are saved, and machines that go on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm.virtio.entropy.device import EntropyDevice
from tests.support.counting_guest import COUNT, COUNTER, Make, config_maker, count_of, wait_for_more
from tests.support.patience import patient
from tests.support.snapshots import Resources

pytestmark = pytest.mark.bare

ECHO_THEN_STATUS = bytes.fromhex(
    "66baf803 b068 ee b061 ee"  # "ha", and no end of the line
    "66bafd03 ec a801 74fb"  # again: mov dx, 0x3fd; in al, dx; test al, 1; jz again
    "66baf803 ec 3c21 7403"  # in al, dx; cmp al, '!'; je done
    "ee ebeb"  # out dx, al; jmp again (to mov)
    "b003 e6f4 f4"
)
STATUS_3 = pyvmm.Outcome(pyvmm.Kind.GUEST_STATUS, 3)

config = pytest.fixture(config_maker)


@pytest.fixture
def echo(config: Make) -> Iterator[pyvmm.Machine]:
    """A machine that has printed "ha", and echoes until it gets a "!"."""
    with pyvmm.Machine(config(ECHO_THEN_STATUS)) as machine:
        machine.start()
        machine.console.expect("ha", patient(20))
        yield machine


def test_a_script_talks_to_the_original_and_to_each_clone(echo: pyvmm.Machine) -> None:
    with echo.snapshot() as snapshot:
        for word in ("one", "two"):
            with snapshot.clone(timeout_s=patient(30)) as clone:
                assert clone.console.text == "", "it has its own console"
                clone.start()
                clone.console.write(f"{word}!")
                assert clone.wait() == STATUS_3
                assert clone.console.text == word
    echo.console.write("self!")
    assert echo.wait() == STATUS_3
    assert echo.console.text == "haself"


def test_a_snapshot_in_a_directory_is_opened_again(echo: pyvmm.Machine, tmp_path: Path) -> None:
    with echo.snapshot(tmp_path / "saved") as snapshot:
        number, path = snapshot.id, snapshot.path
        assert path == str(tmp_path / "saved")
    echo.close()
    with pyvmm.Snapshot.open(tmp_path / "saved") as snapshot:
        assert (snapshot.id, snapshot.path) == (number, path)
        with snapshot.clone(console=tmp_path / "shown", timeout_s=patient(30)) as clone:
            clone.console.write("typed!")
            assert clone.run() == STATUS_3
            assert clone.console.text == "typed"
        assert (tmp_path / "shown").read_bytes() == b"typed"


def test_the_facts_of_the_kernel_come_along_without_its_file(
    config: Make, tmp_path: Path
) -> None:
    with pyvmm.Machine(config(COUNT)) as machine:
        kernel = machine._machine.kernel
        machine.start()
        machine.snapshot(tmp_path / "saved").close()
    (tmp_path / "guest.elf").unlink()
    with pyvmm.Snapshot.open(tmp_path / "saved") as snapshot, snapshot.clone() as clone:
        assert clone._machine.kernel.describe() == kernel.describe()
        clone.start()
        assert clone.stop() == pyvmm.Outcome(pyvmm.Kind.STOPPED)


def test_each_clone_has_a_number_of_its_own(config: Make) -> None:
    with pyvmm.Machine(config(COUNT)) as machine:
        assert machine.clone_id is None
        machine.start()
        with machine.snapshot() as one, machine.snapshot() as two:
            assert one.id != two.id
            with one.clone() as first, one.clone() as second, two.clone() as third:
                numbers = {one.id, two.id, first.clone_id, second.clone_id, third.clone_id}
                assert len(numbers) == 5


def test_a_line_that_was_half_printed_is_whole_in_the_clone(echo: pyvmm.Machine) -> None:
    """The second half alone would say nothing of a panic."""
    echo.console.write("\r\n[    1.000000] Kernel panic - not ")
    echo.console.expect("- not ", patient(20))
    with echo.snapshot() as snapshot, snapshot.clone(timeout_s=patient(30)) as clone:
        clone.console.write("syncing: torn\r\n")
        outcome = clone.run()
        assert (outcome.kind, outcome.detail) == (pyvmm.Kind.PANIC, "torn")
        assert clone.console.text == "syncing: torn\r\n"
    assert not echo.evidence.has_panicked


def test_the_clock_of_a_clone_goes_on_from_the_snapshot_or_from_now(config: Make) -> None:
    def clock_ns(clone: pyvmm.Machine) -> int:
        chips = clone._machine.save()["chips"]
        assert isinstance(chips, dict)
        return int.from_bytes(chips["clock"][:8], "little")

    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        with machine.snapshot() as snapshot:
            time.sleep(2.0)
            with snapshot.clone() as kept, snapshot.clone(clock="now") as now:
                assert clock_ns(now) - clock_ns(kept) > 1_500_000_000


def test_a_clone_has_its_own_time_limit(config: Make) -> None:
    with pyvmm.Machine(config(COUNT, timeout_s=patient(600))) as machine:
        machine.start()
        with machine.snapshot() as snapshot, snapshot.clone(timeout_s=0.05) as clone:
            outcome = clone.run()
            assert outcome.kind == pyvmm.Kind.TIMEOUT
        assert machine.outcome is None


def test_a_snapshot_has_the_ram_of_its_moment(config: Make) -> None:
    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        wait_for_more(machine, 0)
        machine.pause()
        before = count_of(machine)
        with machine.snapshot() as snapshot:
            machine.resume()
            wait_for_more(machine, before)
            with snapshot.clone() as clone:
                assert count_of(clone) == before
                clone.memory.write(COUNTER, bytes(4))
            with snapshot.clone() as clone:
                assert count_of(clone) == before


# Prepared clones


def test_prepared_clones_are_taken_and_the_rest_is_freed(config: Make) -> None:
    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        before = Resources.now()
        with machine.snapshot() as snapshot:
            snapshot.prepare(5)
            assert snapshot.wait_until_prepared(patient(30))
            assert snapshot.ready == 5
            clones = [snapshot.clone() for _ in range(6)]
            assert snapshot.ready == 0
            snapshot.prepare(3)
            for clone in clones:
                clone.start()
            for clone in clones:
                assert clone.stop() == pyvmm.Outcome(pyvmm.Kind.STOPPED)
                clone.close()
        assert Resources.now().without_image() == before.without_image()


def test_a_clone_that_asks_for_more_than_is_prepared_is_made_anew(
    config: Make, tmp_path: Path
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes((tmp_path / "disk.img").read_bytes())
    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        with machine.snapshot() as snapshot:
            snapshot.prepare(1)
            assert snapshot.wait_until_prepared(patient(30))
            disks = {0: pyvmm.Overlay(other, tmp_path / "kept.overlay")}
            with snapshot.clone(disks=disks) as clone:
                clone.start()
            assert snapshot.ready == 1
    assert (tmp_path / "kept.overlay").stat().st_size > 0


def test_lines_of_a_prepared_clone_go_to_whoever_took_it(config: Make) -> None:
    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        with machine.snapshot() as snapshot:
            snapshot.prepare(1)
            assert snapshot.wait_until_prepared(patient(30))
            lines: list[str] = []
            with snapshot.clone(report=lines.append) as clone:
                clone._machine.runner.report("odd")
    assert lines == ["odd"]


def test_a_host_that_cannot_make_more_says_so_once(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise pyvmm.HostError("no more descriptors")

    lines: list[str] = []
    with pyvmm.Machine(config(COUNT), report=lines.append) as machine:
        machine.start()
        with machine.snapshot() as snapshot:
            monkeypatch.setattr("pyvmm.snapshot.snapshot.build", refuse)
            snapshot.prepare(20)
            assert snapshot.wait_until_prepared(patient(30))
            assert snapshot.ready == 0
            with pytest.raises(pyvmm.HostError, match="no more descriptors"):
                snapshot.clone()
            monkeypatch.undo()
            with snapshot.clone() as clone:
                clone.start()
    assert 1 <= len(lines) <= 4
    assert set(lines) == {
        "the snapshot in memory: no more clones are prepared: no more descriptors"
    }


# Devices of a script's own


def test_devices_of_ones_own_are_given_again(config: Make) -> None:
    with pyvmm.Machine(config(COUNT), devices={"chance": EntropyDevice()}) as machine:
        machine.start()
        with machine.snapshot() as snapshot:
            with pytest.raises(pyvmm.SnapshotError, match=r"devices of a script's own: chance;"):
                snapshot.clone()
            with pytest.raises(pyvmm.SnapshotError, match=r"the\s+same ones again.* not luck"):
                snapshot.clone(devices={"luck": EntropyDevice()})
            with pytest.raises(pyvmm.SnapshotError, match=r"prepare.*devices of your own"):
                snapshot.prepare(1)
            with snapshot.clone(devices={"chance": EntropyDevice()}) as clone:
                clone.start()


# Misuse


def test_a_closed_snapshot_makes_no_clones(config: Make) -> None:
    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        snapshot = machine.snapshot()
        clone = snapshot.clone()
        snapshot.close()
        snapshot.close()
        for use in (snapshot.clone, lambda: snapshot.prepare(1)):
            with pytest.raises(RuntimeError, match="the snapshot was closed"):
                use()
        with clone:
            clone.start()  # what it has it keeps
            clone.stop()
    with pytest.raises(RuntimeError, match=r"snapshot\(\): the machine was closed"):
        machine.snapshot()


def test_a_snapshot_that_nobody_closes_says_so(config: Make) -> None:
    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.warns(ResourceWarning, match="the snapshot was never closed"):
            machine.snapshot()  # which goes at once
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # its image, which the machine has


@pytest.mark.parametrize(
    ("options", "kind", "problem"),
    [
        ({"clock": "later"}, pyvmm.SnapshotError, "clock 'later': is none of keep, now"),
        ({"timeout_s": "soon"}, TypeError, "timeout_s must be seconds or None"),
        ({"timeout_s": -1}, pyvmm.ConfigError, "--timeout -1: must be a number of seconds above"),
        ({"console": 1}, TypeError, "console must be a path or None"),
        ({"disks": {"vda": "x"}}, TypeError, "the index of a disk must be int, not str"),
        ({"disks": ["x"]}, TypeError, "disks are by index from 0, .*, not list"),
        ({"report": 5}, TypeError, "report must be a function of a text, not int"),
        ({"clock": 5}, TypeError, "clock must be 'keep' or 'now', not int"),
        ({"console": b"x"}, TypeError, "console must be a path or None, not bytes"),
        ({"disks": {3: pyvmm.MemoryDisk(512)}}, pyvmm.SnapshotError,
         "disk 3: the snapshot in memory has 1 disk, number 0$"),
        ({"disks": {0: pyvmm.MemoryDisk(1 << 20, read_only=True)}}, pyvmm.SnapshotError,
         "disk 0: MemoryDisk.*the guest knows it as writable"),
        ({"disks": {0: pyvmm.MemoryDisk(512)}}, pyvmm.SnapshotError,
         "disk 0: MemoryDisk.* has 512 bytes, .* 1048576"),
        ({"disks": {0: pyvmm.VhostUserDisk(socket="x")}}, pyvmm.SnapshotError, "disk 0: a disk th"),
        ({"devices": []}, TypeError, "devices are virtio devices by name"),
    ],
)
def test_a_clone_with_a_mistake_is_one_error(
    config: Make, options: dict[str, Any], kind: type[Exception], problem: str
) -> None:
    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        with machine.snapshot() as snapshot:
            before = Resources.now()
            with pytest.raises(kind, match=problem):
                snapshot.clone(**options)
            assert Resources.now() == before


def test_two_threads_may_save_one_machine_at_once(config: Make) -> None:
    kept: list[pyvmm.Snapshot] = []
    with pyvmm.Machine(config(COUNT)) as machine:
        machine.start()
        threads = [
            threading.Thread(target=lambda: kept.append(machine.snapshot())) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(kept) == 4
        for snapshot in kept:
            with snapshot, snapshot.clone() as clone:
                before = count_of(clone)
                clone.start()
                wait_for_more(clone, before)
