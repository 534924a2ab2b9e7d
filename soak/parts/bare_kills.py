"""SIGKILL of ``pyvmm run`` under a bare guest that acknowledges records: on any /dev/kvm.

Of every kind of disk, with split and packed rings, at a random moment: one in eight while the VM
starts, the others up to a quarter of a second after the first acknowledged record.  An overlay's
file is killed three times in a row, each run going on where the one before was cut off.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvmm.storage.open import DiskSource
from soak.errors import TrialError
from soak.part import Figures, Part, Trial, Work
from soak.processes import END_S, killed_at_last
from soak.records import RecordsGuest, acknowledged, check_records, new_disk, read_disk
from tests.support.nbd_servers import qemu_nbd
from tests.support.patience import patient

SECTORS = 1 << 15
KINDS = (
    "raw", "overlay", "raw,writeback=off", "serve=exit", "overlay", "nbd", "cpus=2", "overlay",
)
ROUNDS_OF_AN_OVERLAY = 3
START_S = 0.15
LONGEST_S = 0.25
ACK_BYTES = 10


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the trial: its option of ``pyvmm run``, and how it is read afterwards."""

    option: str
    source: DiskSource
    options: tuple[str, ...] = ()
    rounds: int = 1


@contextlib.contextmanager
def disk_of(kind: str, folder: Path) -> Iterator[Disk]:
    """An empty disk of ``kind`` in ``folder``, for as long as a server of it is needed."""
    path = new_disk(folder / "disk.img", SECTORS)
    plain = DiskSource(location=str(path))
    match kind:
        case "overlay":
            store = str(folder / "overlay")
            source = DiskSource(location=str(path), snapshot=True, overlay=store)
            yield Disk(f"{path},overlay={store}", source, rounds=ROUNDS_OF_AN_OVERLAY)
        case "nbd":
            with qemu_nbd(folder / "socket", path, stderr=subprocess.DEVNULL):
                yield Disk(f"nbd+unix:///disk?socket={folder / 'socket'}", plain)
        case "serve=exit":
            yield Disk(str(path), plain, ("--serve", "exit"))
        case "cpus=2":
            yield Disk(str(path), plain, ("--cpus", "2"))
        case _:
            yield Disk(f"{path}{kind.removeprefix('raw')}", plain)


def kill(trial: Trial, guest: RecordsGuest) -> Figures:
    """Do one trial."""
    kind, packed = KINDS[trial.number % len(KINDS)], bool(trial.number // len(KINDS) % 2)
    acked_in_all, kills, first = 0, 0, 1
    with disk_of(kind, trial.folder) as disk:
        for _ in range(disk.rounds):
            kernel = guest.write(
                trial.folder / "guest.elf", first=first, end=SECTORS, packed=packed
            )
            acked = _killed(trial, kernel, disk)
            kills += 1
            found = check_records(read_disk(disk.source), acked, first=first)
            acked_in_all += len(acked)
            first += found
    return {"kind": kind, "packed": packed, "kills": kills, "acked": acked_in_all}


def _killed(trial: Trial, kernel: Path, disk: Disk) -> list[int]:
    """Run the guest and kill it; return what it had acknowledged."""
    vm = RecordsGuest.start(kernel, disk.option, *disk.options, timeout_s=patient(END_S))
    with killed_at_last(vm):
        assert vm.stdout is not None
        assert vm.stderr is not None
        console = b""
        if trial.random.random() < 1 / 8:
            time.sleep(trial.random.random() * START_S)
        else:
            console = os.read(vm.stdout.fileno(), ACK_BYTES)
            time.sleep(trial.random.random() * LONGEST_S)
        vm.kill()
        console += vm.stdout.read()
        said = vm.stderr.read()
        if said or vm.wait() != -9:
            raise TrialError(f"ended before it was killed: {vm.returncode}, {said!r}")
    acked, failed = acknowledged(console)
    if failed:
        raise TrialError(f"an I/O error at record {failed[0]}")
    return acked


def run(work: Work) -> None:
    """Do what is left."""
    guest = RecordsGuest.assembled(work.folder)
    work.each(lambda trial: kill(trial, guest))


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    return {
        "SIGKILLs": sum(line.get("kills", 0) for line in trials),
        "records acknowledged, all found": sum(line.get("acked", 0) for line in trials),
        "trials, by kind of disk": dict(Counter(line["kind"] for line in trials)),
    }


PART = Part(
    name="bare_kills", about="SIGKILL of VMs whose bare guests acknowledge records",
    things="trials", size=2000, run=run, summary=summary,
)
