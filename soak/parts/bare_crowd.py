"""Many VMs at once on this host, each with a bare guest that acknowledges records all the time."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from pyvmm.storage.open import DiskSource
from soak.errors import TrialError
from soak.part import Figures, Part, Trial, Work
from soak.processes import END_S, killed_at_last
from soak.records import RecordsGuest, acknowledged, check_records, new_disk, read_disk
from soak.usage import Usage
from tests.support.patience import patient

SECTORS = 1 << 15
RAM_KIB = 16 << 10
TOGETHER_S, SHARE_S = 20.0, 0.5
"""How long they write at once: so many seconds, less if they are few."""
SECONDS_A_VM = 2.0


def crowd(trial: Trial, guest: RecordsGuest) -> Figures:
    """Do one trial: as many VMs as its number says."""
    count = trial.number
    limit_s = patient(END_S + SECONDS_A_VM * count)
    kernel = guest.write(trial.folder / "guest.elf", first=1, end=SECTORS, packed=True)
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        vms, disks = [], []
        for number in range(count):
            disks.append(new_disk(trial.folder / f"disk{number}.img", SECTORS))
            vms.append(stack.enter_context(killed_at_last(RecordsGuest.start(
                kernel, str(disks[-1]), timeout_s=limit_s + TOGETHER_S
            ))))
        consoles = [b""] * count
        _listen(vms, consoles, began_s + limit_s, until_all_have_spoken=True)
        up_s = time.monotonic() - began_s
        usages = [Usage.of(vm.pid, ram_kib=RAM_KIB) for vm in vms]
        _listen(vms, consoles, time.monotonic() + min(TOGETHER_S, count * SHARE_S))
        for vm in vms:
            vm.send_signal(signal.SIGTERM)
        acked_in_all = 0
        for vm, disk, console in zip(vms, disks, consoles, strict=True):
            out, said = vm.communicate(timeout=limit_s)
            if vm.returncode != 128 + signal.SIGTERM:
                raise TrialError(f"status {vm.returncode}: {said!r}")
            acked_in_all += _checked(disk, console + out)
    own = sorted(usage.own_kib for usage in usages)
    return {
        "up_s": round(up_s, 1), "acked": acked_in_all, "own_kib": own[count // 2],
        "most_own_kib": own[-1], "threads": max(usage.threads for usage in usages),
        "descriptors": max(usage.descriptors for usage in usages),
    }


def _listen(
    vms: Sequence[subprocess.Popen[bytes]], consoles: list[bytes], until_s: float,
    *, until_all_have_spoken: bool = False,
) -> None:
    """Take what the guests print, until it is time, or until each has said something."""
    with selectors.DefaultSelector() as selector:
        for index, vm in enumerate(vms):
            assert vm.stdout is not None
            selector.register(vm.stdout, selectors.EVENT_READ, index)
        while time.monotonic() < until_s:
            if until_all_have_spoken and all(consoles):
                return
            for key, _ in selector.select(0.5):
                found = os.read(key.fd, 1 << 16)
                if not found:
                    raise TrialError(f"VM {key.data} has ended: {_last_words(vms[key.data])!r}")
                consoles[key.data] += found
    if until_all_have_spoken:
        raise TrialError(f"{consoles.count(b'')} of {len(vms)} VMs are silent")


def _last_words(vm: subprocess.Popen[bytes]) -> bytes:
    assert vm.stderr is not None
    return vm.stderr.read()


def _checked(disk: Path, console: bytes) -> int:
    """Return how many records were acknowledged; all of them are there."""
    acked, failed = acknowledged(console)
    if failed:
        raise TrialError(f"an I/O error at record {failed[0]}")
    check_records(read_disk(DiskSource(location=str(disk))), acked, first=1)
    return len(acked)


def run(work: Work) -> None:
    """Do what is left."""
    guest = RecordsGuest.assembled(work.folder)
    work.each(lambda trial: crowd(trial, guest))


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    largest = max(trials, key=lambda line: int(line["trial"]))
    return {
        "at once": largest["trial"],
        "all had written a record after": f"{largest['up_s']} s",
        "records acknowledged, all found": largest["acked"],
        "memory of a VM's process without its guest's RAM, median":
            f"{largest['own_kib'] / 1024:.1f} MiB",
        "threads and descriptors of one": f"{largest['threads']}, {largest['descriptors']}",
    }


PART = Part(
    name="bare_crowd", about="VMs at once, whose bare guests write records",
    things="VMs", size=100, run=run, summary=summary, at_once=True,
)
