"""Linux that goes back: twenty times under the load of a disk, and to before a panic."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from pyvmm.config import DiskConfig
from pyvmm.run.outcome import Kind
from pyvmm.snapshot.checkpoints import checkpoints_of
from tests.support.linux_machine import LinuxMachine, linux_config
from tests.support.patience import patient

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(1800)]

REWINDS = 20
PREPARE = (
    "mount -t tmpfs none /tmp; /sbin/mke2fs -q -t ext4 /dev/vdb; mkdir /tmp/m;"
    " mount /dev/vdb /tmp/m; cd /tmp/m;"
    " for i in 1 2 3 4; do dd if=/dev/urandom of=a$i bs=64k count=8 2>/dev/null; done;"
    " md5sum a1 a2 a3 a4 >sums; sync; cd /"
)
LOAD = (
    "{ (n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); dd if=/dev/urandom of=/tmp/m/b$((n%5))"
    " bs=16k count=20 2>/dev/null; sync; rm -f /tmp/m/b$(((n+2)%5)); done; touch /tmp/stopped) & }"
)
CHECK = (
    "touch /tmp/stop; while [ ! -e /tmp/stopped ]; do sleep 0.1; done; umount /tmp/m &&"
    " /sbin/e2fsck -fn /dev/vdb >/tmp/fsck 2>&1; echo fsck $?; mount /dev/vdb /tmp/m &&"
    " cd /tmp/m && md5sum -c sums; cd /"
)


def rewindable(folder: Path, append: str = "", cpus: int = 1) -> LinuxMachine:
    """A Linux with a root and one disk that nobody writes in place."""
    config = linux_config(folder, cpus=cpus, append=append, data_disks=1)
    disks = []
    for disk in config.disks:
        assert isinstance(disk, DiskConfig)
        if not disk.read_only:
            disk = disk.replace(source=disk.source.replace(snapshot=True))  # type: ignore[attr-defined]
        disks.append(disk)
    return LinuxMachine(config.replace(disks=tuple(disks)))


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_file_system_is_whole_after_each_of_twenty_rewinds(tmp_path: Path, cpus: int) -> None:
    chance = random.Random(cpus)
    with rewindable(tmp_path, cpus=cpus) as linux:
        linux.begin()
        complaints = linux.complaints()  # of the lab's TSCs, while it booted
        assert linux.run(PREPARE) == ""
        linux.run(LOAD)
        moments = checkpoints_of(linux.machine)
        moments.take()
        for _ in range(REWINDS):
            time.sleep(chance.uniform(0.1, 1.0))
            if chance.random() < 0.3:
                moments.take()
            moments.rewind()
            if chance.random() < 0.5:
                time.sleep(chance.uniform(0.1, 0.5))
            said = linux.run(CHECK).splitlines()
            assert said == ["fsck 0", *(f"a{number}: OK" for number in range(1, 5))]
            moments.rewind()
        assert linux.complaints() == complaints


def test_a_boot_is_kept_every_100_ms_and_a_panic_is_undone(tmp_path: Path) -> None:
    with rewindable(tmp_path, append="panic=-1") as linux:
        machine = linux.machine
        machine.start()
        moments, before = checkpoints_of(machine), 0
        linux_began_s, took_s = time.monotonic(), []
        while "# " not in linux.shown:
            time.sleep(0.1)
            began_s = time.monotonic()
            moments.take()
            took_s.append(time.monotonic() - began_s)
            assert time.monotonic() < linux_began_s + patient(600)
        linux.wait_for("# ")
        print(f"{len(took_s)} checkpoints of a boot, {moments.held_bytes >> 20} MiB to undo them, "
              f"median {sorted(took_s)[len(took_s) // 2] * 1e3:.1f} ms")
        assert moments.dropped == 0
        assert linux.run("echo 1 >/proc/sys/kernel/sysrq; echo before >/dev/shm/note") == ""
        before = moments.take()
        linux.type("echo c >/proc/sysrq-trigger\n")
        outcome = machine.wait(patient(120))
        assert outcome is not None
        assert outcome.kind is Kind.PANIC
        assert "sysrq triggered crash" in outcome.detail
        moments.rewind()
        assert machine.is_paused
        assert not machine.evidence.has_panicked
        kernel_text = machine.loops[0].vcpu.get_regs().rip
        assert kernel_text != 0
        machine.resume()
        assert linux.run("cat /dev/shm/note") == "before"
        assert linux.complaints() == ""
        # Half-way through the boot, and once more to the shell.
        middle = moments.numbers[len(took_s) // 2]
        moments.rewind(middle)
        assert moments.numbers[-1] == middle < before
        linux.wait_for("# ", 600)
        assert "before" not in linux.run("cat /dev/shm/note")
