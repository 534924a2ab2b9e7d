"""Linux saved in the middle of its work: disks, random bytes and clocks of what goes on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from pyvmm.snapshot.capture import take
from pyvmm.storage.open import DiskSource
from tests.support.guest import BUILD, FIO, MIB
from tests.support.linux_machine import LinuxMachine, Saved, linux_config
from tests.support.patience import patient
from tests.support.stock import BACKPORTS
from tests.vm.test_bare_save import comparable

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(1800)]

DATA_DISKS = ("vdb", "vdc")
PASSES = 2
GONE_S = 35.0
"""A soft lock-up is one of 20 s to Linux, a stall of RCU one of 21 s."""
RANDOM = "dd if=/dev/urandom bs=32 count=1 2>/dev/null | od -An -v -tx1 | tr -d ' \\n'; echo"


def start_load(linux: LinuxMachine) -> None:
    """Have fio write and verify each data disk for ever; a line in /mnt/DISK for each pass."""
    linux.run("mount -t tmpfs none /mnt")
    for disk in DATA_DISKS:
        linux.run(f"touch /mnt/{disk}")
        fio = FIO.format(file=f"/dev/{disk}", size="2m")
        linux.run(
            f"(while {fio} >/mnt/{disk}.said 2>&1; grep -q ';t;0;0;' /mnt/{disk}.said; do"
            f" echo passed >>/mnt/{disk}; done; echo broken >>/mnt/{disk}) & true"
        )


def wait_for_passes(linux: LinuxMachine, more: int) -> None:
    """Wait until fio has found each disk right ``more`` times more; AssertionError if it did not.

    It is asked of the guest, so the guest's shell and console work besides.
    """
    show = "; ".join(f"grep -c passed /mnt/{disk}" for disk in DATA_DISKS)
    broken = "; ".join(
        f"grep -q broken /mnt/{disk} && cat /mnt/{disk}.said" for disk in DATA_DISKS
    )
    before = [int(word) for word in linux.run(show).split()]
    until_s = time.monotonic() + patient(300)
    while True:
        assert linux.run(broken) == ""
        now = [int(word) for word in linux.run(show).split()]
        if all(one >= then + more for one, then in zip(now, before, strict=True)):
            return
        assert time.monotonic() < until_s, (before, now)
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("cpus", "console", "mmio"),
    [(1, "ttyS0", "mapped"), (2, "hvc0", "mapped"), (2, "ttyS0", "trapped")],
)
def test_linux_goes_on_in_another_machine_while_fio_verifies_two_disks(
    tmp_path: Path, cpus: int, console: str, mmio: str
) -> None:
    config = linux_config(tmp_path, cpus=cpus, console=console).replace(mmio=mmio)
    with LinuxMachine(config) as linux:
        linux.begin()
        start_load(linux)
        wait_for_passes(linux, 1)
        complaints = linux.complaints()
        saved = linux.save(tmp_path / "saved")
    for number in range(3):
        with LinuxMachine.restored(saved, tmp_path / f"clone{number}") as clone:
            assert comparable(clone.machine.save()) == with_new_id(saved, clone)
            clone.machine.start()
            wait_for_passes(clone, PASSES)
            assert clone.complaints() == complaints
            saved = clone.save(tmp_path / f"saved{number}")


def with_new_id(saved: Saved, clone: LinuxMachine) -> dict[str, object]:
    """The state of ``saved`` for a comparison, with the generation ID that ``clone`` got."""
    state = comparable(saved.state)
    board = state["board"]
    assert isinstance(board, dict)
    own = clone.machine.board.vmgenid
    parts = board["parts"] | {"VM generation ID": own.save()}
    return state | {"board": board | {"parts": parts}}


@pytest.mark.parametrize("stock", [None, BACKPORTS], ids=["ours", "backports"])
def test_clones_never_share_random_bytes(tmp_path: Path, stock: str | None) -> None:
    # One vCPU: each has a seed of its own.
    config = linux_config(tmp_path, stock=stock, data_disks=0)
    with LinuxMachine(config) as linux:
        linux.begin()
        assert "virtual machine fork" not in linux.run("dmesg")
        value = linux.machine.board.vmgenid.value
        saved = older_by_an_hour(linux.save(tmp_path / "young"))
    # Early after its boot Linux often reseeds by itself, then once a minute.
    with LinuxMachine.restored(saved, tmp_path / "old", clock="now", clone_id=value) as linux:
        linux.machine.start()
        linux.run(f"sleep 3; {RANDOM}; sleep 1")
        saved = linux.save(tmp_path / "saved")
    # The control: clones that are not told are alike, unless Linux reseeds by itself just then.
    assert any(random_bytes(saved, tmp_path, f"untold{n}-", value) == 1 for n in range(4))
    assert random_bytes(saved, tmp_path, "told", None) == 2


def older_by_an_hour(saved: Saved) -> Saved:
    """``saved``, as if an hour more had passed since."""
    realtime_ns = saved.state["realtime_ns"]
    assert isinstance(realtime_ns, int)
    return replace(saved, state=saved.state | {"realtime_ns": realtime_ns - 3600 * 10**9})


def random_bytes(saved: Saved, folder: Path, name: str, clone_id: UUID | None) -> int:
    """How many different random numbers two clones of ``saved`` give.

    With a ``clone_id`` that the guest knows, it is not told.
    """
    said = set()
    for number in range(2):
        where = folder / f"{name}{number}"
        with LinuxMachine.restored(saved, where, clone_id=clone_id) as clone:
            clone.machine.start()
            if clone_id is None:
                # The kernel tells as it reseeds: what is read before may be shared.
                clone.run("while ! dmesg | grep 'virtual machine fork'; do sleep 0.1; done")
            said.add(clone.run(RANDOM))
            told = "crng reseeded due to virtual machine fork" in clone.run("dmesg")
            assert told is (clone_id is None)
            interrupts = clone.run("grep -c 'ACPI:Ged' /proc/interrupts")
            assert interrupts == "1"
    assert all(len(one) == 64 for one in said)
    return len(said)


@pytest.mark.parametrize("clock", ["keep", "now"])
def test_a_long_pause_is_no_lock_up_and_the_date_is_right_if_asked_for(
    tmp_path: Path, clock: str
) -> None:
    """Debian's kernel, as ours has no watchdogs.  ``now``: an hour is said to be gone, besides."""
    config = linux_config(tmp_path, cpus=2, stock=BACKPORTS, data_disks=0)
    with LinuxMachine(config) as linux:
        linux.begin()
        linux.run("for i in 1 2; do (while :; do :; done) & done; sleep 5")
        complaints, behind_s = linux.complaints(), seconds_behind(linux)
        saved = linux.save(tmp_path / "saved")
    time.sleep(GONE_S)
    more_s = 3600 if clock == "now" else 0
    if more_s:
        saved = older_by_an_hour(saved)
    with LinuxMachine.restored(saved, tmp_path / "clone", clock=clock) as clone:
        clone.machine.start()
        now_s = seconds_behind(clone)
        clone.run("sleep 25")  # the watchdogs have had their turn
        assert clone.complaints() == complaints
        if clock == "now":
            assert abs(now_s + more_s - behind_s) < 10
        else:
            assert GONE_S - 1 < now_s - behind_s < GONE_S + 200
            # The chip has the true time: so a guest can set its own.
            clone.run("hwclock -u -s")
            assert abs(seconds_behind(clone)) < 15


def seconds_behind(linux: LinuxMachine) -> float:
    """By how much the guest's date is behind the host's."""
    return time.time() - float(linux.run("date +%s"))


def test_debian_with_systemd_goes_on(tmp_path: Path) -> None:
    config = linux_config(tmp_path, cpus=2, stock=BACKPORTS, data_disks=0)
    disk = config.disks[0]
    source = DiskSource(location=str(BUILD / "debian.img"), snapshot=True)
    config = config.replace(
        disks=(disk.replace(source=source),), memory_bytes=512 * MIB,
        append="root=/dev/vda rw quiet",
    )
    with LinuxMachine(config) as linux:
        linux.begin("pyvmm login: ")
        linux.type("root\n")
        linux.wait_for("# ")
        linux.run("systemctl is-system-running --wait")
        failed = linux.run("systemctl --failed --no-legend --plain --no-pager")
        complaints = linux.complaints()
        linux.run(
            "cd /root; (for i in $(seq 100); do dd if=/dev/urandom of=f$i bs=64k count=4"
            " conv=fsync 2>/dev/null; md5sum f$i >>sums; done; touch all) & sleep 2"
        )
        # Not saved by hand: in the lab files are memory, as all these copies would be.
        snapshot = take(linux.machine)
    for clock in ("keep", "now"):
        with LinuxMachine.clone_of(snapshot, tmp_path / clock, clock=clock) as clone:
            clone.run("while [ ! -e all ]; do sleep 1; done; sync")
            clone.run("echo 3 >/proc/sys/vm/drop_caches")
            assert clone.run("md5sum -c sums | grep -vc OK") == "0"
            assert clone.run("wc -l <sums") == "100"
            assert clone.complaints() == complaints
            assert clone.run("systemctl --failed --no-legend --plain --no-pager") == failed
            assert "virtual machine fork" in clone.run("dmesg")
            if clock == "now":
                assert abs(seconds_behind(clone)) < 15
            clone.type("poweroff\n")
            outcome = clone.machine.wait(patient(300))
            assert outcome is not None
            assert outcome.exit_status == 0
    snapshot.close()
