"""Disks that fail under bare guests: every record that was acknowledged is there all the same.

A script makes requests fail, come in pieces, or wait; or an NBD server is killed, or stands still,
in the middle.  The guest is told of each request that failed and goes on to its end, pyvmm says a
few lines at most, and nothing is lost of what it acknowledged.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pyvmm.storage.open import DiskSource
from soak.errors import TrialError
from soak.part import Figures, Part, Trial, Work
from soak.processes import END_S, killed_at_last
from soak.records import RecordsGuest, acknowledged, check_records, new_disk, read_disk
from tests.support.nbd_servers import qemu_nbd
from tests.support.patience import patient

RECORDS = 120
KINDS = ("raw", "overlay", "raw,writeback=off", "server killed", "raw,queues=4", "server stopped")
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "ETIMEDOUT")
MOST_LINES = 20
LONGEST_S = 0.4
STOPPED_S = 0.3


def script(rng: random.Random) -> str:
    """Return a fault script: up to five faults, of requests that the guest will make."""
    lines = []
    for _ in range(rng.randrange(1, 6)):
        which = _which(rng)
        match rng.randrange(5):
            case 0:
                lines.append(f"write {which}: {rng.choice(ERRORS)}")
            case 1:
                lines.append(f"flush {rng.randrange(1, RECORDS)}: {rng.choice(ERRORS)}")
            case 2:
                lines.append(f"write {which}: torn {rng.randrange(512)} {rng.choice(ERRORS)}")
            case 3:
                first = rng.randrange(1, RECORDS)
                lines.append(f"write * sectors {first}-{first + rng.randrange(4)}: ENOSPC")
            case _:
                lines.append(f"any {which}: delay {rng.choice((0.001, 0.01, 0.1))}")
    return "\n".join(lines) + "\n"


def _which(rng: random.Random) -> str:
    first = rng.randrange(1, RECORDS)
    return rng.choice((str(first), f"{first}-{first + rng.randrange(10)}"))


def fail(trial: Trial, guest: RecordsGuest) -> Figures:
    """Do one trial."""
    kind, folder = KINDS[trial.number % len(KINDS)], trial.folder
    kernel = guest.write(
        folder / "guest.elf", first=1, end=RECORDS + 1, packed=trial.random.random() < 0.5
    )
    disk = new_disk(folder / "disk.img", RECORDS + 8)
    source = DiskSource(location=str(disk))
    if kind.startswith("server"):
        console = _with_server(trial, kernel, disk, stops=kind == "server stopped")
    else:
        faults = folder / "faults"
        faults.write_text(script(trial.random))
        option = f"{disk}{kind.removeprefix('raw')}"
        if kind == "overlay":
            option = f"{disk},overlay={folder / 'overlay'}"
            source = DiskSource(
                location=str(disk), snapshot=True, overlay=str(folder / "overlay")
            )
        vm = RecordsGuest.start(
            kernel, f"{option},faults={faults}", timeout_s=patient(END_S)
        )
        with killed_at_last(vm):
            console = _to_the_end(vm, b"")
    acked, failed = acknowledged(console)
    if sorted(acked + failed) != list(range(1, RECORDS + 1)):
        raise TrialError(f"the guest told of {len(acked) + len(failed)} records of {RECORDS}")
    check_records(read_disk(source), acked, first=1, failed=failed)
    return {"kind": kind, "acked": len(acked), "errors": len(failed)}


def _with_server(trial: Trial, kernel: Path, disk: Path, *, stops: bool) -> bytes:
    """Run the guest on an NBD server that is killed, or that stands still for a while."""
    socket = trial.folder / "socket"
    with qemu_nbd(socket, disk, stderr=subprocess.DEVNULL) as server:
        vm = RecordsGuest.start(
            kernel, f"nbd+unix:///disk?socket={socket}", timeout_s=patient(END_S)
        )
        with killed_at_last(vm):
            assert vm.stdout is not None
            console = os.read(vm.stdout.fileno(), 1)
            time.sleep(trial.random.random() * LONGEST_S)
            if stops:
                server.send_signal(signal.SIGSTOP)
                time.sleep(STOPPED_S)
                server.send_signal(signal.SIGCONT)
            else:
                server.kill()
            return _to_the_end(vm, console)


def _to_the_end(vm: subprocess.Popen[bytes], console: bytes) -> bytes:
    """Return all of the console; the guest must have come to its own end, and pyvmm must not have
    said much."""
    out, said = vm.communicate(timeout=patient(2 * END_S))
    lines = said.decode().splitlines()
    if vm.returncode != 0:
        raise TrialError(f"status {vm.returncode}: {said!r}")
    if len(lines) > MOST_LINES or any(not line.startswith("pyvmm: ") for line in lines):
        raise TrialError(f"said {len(lines)} lines: {lines[:3]}")
    return console + out


def run(work: Work) -> None:
    """Do what is left."""
    guest = RecordsGuest.assembled(work.folder)
    work.each(lambda trial: fail(trial, guest))


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    return {
        "VMs": dict(Counter(line["kind"] for line in trials)),
        "records acknowledged, all found": sum(line["acked"] for line in trials),
        "records that failed, as the guest was told": sum(line["errors"] for line in trials),
    }


PART = Part(
    name="faults", about="disks that fail, wait and tear, NBD servers killed and stopped",
    things="VMs", size=1000, run=run, summary=summary,
)
