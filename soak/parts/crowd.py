"""Many VMs with Linux at once: all boot, then all work on their disks at the same time."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from soak.errors import TrialError
from soak.part import Figures, Part, Trial, Work
from soak.processes import killed_at_last, pyvmm
from soak.records import new_disk
from soak.usage import Usage
from tests.support.guest import IMAGE, KERNEL, MIB, run_in_guest
from tests.support.patience import patient

RAM_MIB = 64
ROUNDS = 5
SECONDS_A_VM = 60.0
SCRIPT = (
    "echo is-up; read go; mount -t ext4 /dev/vdb /mnt; n=0; while [ $n -lt {rounds} ]; do"
    " n=$((n+1)); dd if=/dev/urandom of=/dev/shm/x bs=64k count=16 2>/dev/null;"
    " cp /dev/shm/x /mnt/f$n; sync; echo 3 > /proc/sys/vm/drop_caches;"
    " cmp /dev/shm/x /mnt/f$n && echo whole $n; done; umount /mnt"
)


def crowd(trial: Trial) -> Figures:
    """Do one trial: as many VMs as its number says."""
    count, folder = trial.number, trial.folder
    limit_s = patient(SECONDS_A_VM * (count + 2))
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        vms = [stack.enter_context(killed_at_last(_start(folder, number, limit_s)))
               for number in range(count)]
        consoles = [folder / f"console{number}" for number in range(count)]
        _wait_for_all(vms, consoles, began_s + limit_s)
        up_s = time.monotonic() - began_s
        for vm in vms:
            assert vm.stdin is not None
            vm.stdin.write(b"go\n")
            vm.stdin.flush()
        usages = [Usage.of(vm.pid, ram_kib=RAM_MIB << 10) for vm in vms]
        for vm, console in zip(vms, consoles, strict=True):
            _, said = vm.communicate(timeout=limit_s)
            whole = re.findall(rb"^whole \d+\r?$", console.read_bytes(), re.MULTILINE)
            if vm.returncode or said or len(whole) != ROUNDS:
                raise TrialError(f"status {vm.returncode}, {len(whole)} rounds, {said!r}")
    own = sorted(usage.own_kib for usage in usages)
    return {
        "up_s": round(up_s, 1), "all_s": round(time.monotonic() - began_s, 1),
        "own_kib": own[count // 2], "rss_kib": sum(usage.rss_kib for usage in usages),
    }


def _start(folder: Path, number: int, limit_s: float) -> subprocess.Popen[bytes]:
    disk = new_disk(folder / f"disk{number}.img", 16 * MIB // 512)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
    console = (folder / f"console{number}").open("wb")
    with console:
        return subprocess.Popen(
            pyvmm("run", "--kernel", KERNEL, "--disk", f"{IMAGE},snapshot", "--disk", disk,
                  "--memory", f"{RAM_MIB}M", "--timeout", f"{2 * limit_s:g}",
                  "--append", f"quiet {run_in_guest(SCRIPT.format(rounds=ROUNDS))}"),
            stdin=subprocess.PIPE, stdout=console, stderr=subprocess.PIPE, start_new_session=True,
        )


def _wait_for_all(
    vms: Sequence[subprocess.Popen[bytes]], consoles: Sequence[Path], until_s: float
) -> None:
    """Wait until each guest has said that it is up."""
    while silent := [path for path in consoles if b"is-up" not in path.read_bytes()]:
        ended = [vm for vm in vms if vm.poll() is not None]
        if ended:
            assert ended[0].stderr is not None
            raise TrialError(f"a VM has ended: {ended[0].stderr.read()!r}")
        if time.monotonic() > until_s:
            raise TrialError(f"{len(silent)} of {len(vms)} guests are not up")
        time.sleep(0.5)


def run(work: Work) -> None:
    """Do what is left."""
    work.each(crowd)


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    largest = max(trials, key=lambda line: int(line["trial"]), default={})
    if not largest:
        return {}
    return {
        "at once": largest["trial"], "all were up after": f"{largest['up_s']} s",
        "all had ended after": f"{largest['all_s']} s",
        "memory of all processes, guests' RAM included": f"{largest['rss_kib'] >> 10} MiB",
        "of one without its guest's RAM, median": f"{largest['own_kib'] / 1024:.1f} MiB",
    }


PART = Part(
    name="crowd", about="VMs with Linux at once, which write and compare files",
    things="VMs", size=20, at_once=True, run=run, linux=True, summary=summary,
)
