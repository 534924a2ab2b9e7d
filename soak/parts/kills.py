"""SIGKILL of the VMM under a Linux that fsyncs records on ext4: every one acknowledged is there.

A Linux is booted once and saved right before it mounts its disk.  Each trial is a clone of that in
a process of its own, with a disk of its own: a raw image, or an overlay's file.  It is killed at a
random moment behind the first acknowledged record.  Every tenth trial boots ``pyvmm run`` instead,
on two vCPUs and four queues.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pyvmm.storage.open import DiskSource
from soak.errors import TrialError
from soak.part import Figures, Part, Trial, Work
from soak.processes import END_S, killed_at_last, pyvmm
from soak.records import new_disk, read_disk
from tests.support.guest import KERNEL, MIB, ROOT_DISK, run_in_guest
from tests.support.linux_machine import copied
from tests.support.patience import patient
from tests.support.power_cut import PowerCut
from tests.support.recorded_guest import check_cut

BOOTS_EVERY = 10
LONGEST_S = 1.5
BOOT_S = 120.0
SECTORS = 16 * MIB // 512
SCRIPT = (
    "mount -t tmpfs t /mnt; mkdir /mnt/d; {warm} mount /dev/vdb /mnt/d; i=0; while true; do"
    " i=$((i+1)); echo record 1-$i > /mnt/d/r1-$i; sync /mnt/d/r1-$i; echo ack 1-$i; done"
)
ACK = re.compile(r"^ack (1-\d+)\r?$", re.MULTILINE)
"""Of a line that the kill has cut, the number is that of an earlier record, acknowledged too."""


class Killer:
    """Has VMs made and kills them.  ``folder`` has the snapshot and the empty file system."""

    def __init__(self, folder: Path) -> None:
        self._base = new_disk(folder / "base.img", SECTORS)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", self._base], check=True)
        saved = folder / "warm"
        script = run_in_guest(SCRIPT.format(warm="pyvmm-warm;"))
        subprocess.run(
            pyvmm("run", "--kernel", KERNEL, *ROOT_DISK, "--disk", f"{self._base},snapshot",
                  "--memory", "64M", "--console", "none", "--timeout", f"{patient(BOOT_S):g}",
                  "--snapshot", saved, "--snapshot-exit", "--append", f"quiet {script}"),
            check=True, stdin=subprocess.DEVNULL,
        )
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "soak.zygote", str(saved)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )
        self._lock = threading.Lock()

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_exc: object) -> None:
        with killed_at_last(self._zygote) as zygote:
            assert zygote.stdin is not None
            zygote.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                zygote.wait(patient(END_S))

    def kill(self, trial: Trial) -> Figures:
        """Do one trial."""
        folder = trial.folder
        image, console = Path(copied(str(self._base), folder)), folder / "console"
        source = DiskSource(location=str(image))
        kind = "raw" if trial.number % 2 else "overlay"
        if trial.number % BOOTS_EVERY == 0:
            kind = "booted"
            with killed_at_last(_booted(image, console)) as vm:
                self._wait_and_kill(trial, vm.pid, console)
        else:
            if kind == "overlay":
                source = DiskSource(
                    location=str(image), snapshot=True, overlay=str(folder / "overlay")
                )
            pid = self._forked(console, image, source.overlay)
            try:
                self._wait_and_kill(trial, pid, console)
            finally:
                _end(pid)
        acked: list[object] = [*ACK.findall(console.read_text(errors="replace"))]
        cut = PowerCut(bytearray(read_disk(source)), acked)
        (folder / "check").mkdir()
        try:
            check_cut(cut, folder / "check")
        except (AssertionError, FileNotFoundError) as error:
            raise TrialError(f"{kind}, {len(acked)} records: {error}") from error
        shutil.rmtree(folder / "check")
        return {"kind": kind, "acked": len(acked)}

    def _forked(self, console: Path, image: Path, overlay: str) -> int:
        """Return the process of a clone."""
        with self._lock:
            assert self._zygote.stdin is not None
            assert self._zygote.stdout is not None
            request = json.dumps([str(console), str(image), overlay])
            self._zygote.stdin.write(f"{request}\n".encode())
            self._zygote.stdin.flush()
            answer = self._zygote.stdout.readline()
            if not answer:
                raise TrialError("the process that forks VMs has ended")
            return int(answer)

    @staticmethod
    def _wait_and_kill(trial: Trial, pid: int, console: Path) -> None:
        """Kill ``pid`` some time after the first record that it acknowledges on ``console``."""
        until_s = time.monotonic() + patient(BOOT_S)
        while not (console.exists() and b"ack 1-1\r\n" in console.read_bytes()):
            if time.monotonic() > until_s or not Path(f"/proc/{pid}").exists():
                raise TrialError("no record was acknowledged")
            time.sleep(0.02)
        time.sleep(trial.random.random() * LONGEST_S)
        if not Path(f"/proc/{pid}").exists():
            raise TrialError("ended before it was killed")
        os.kill(pid, signal.SIGKILL)


def _booted(image: Path, console: Path) -> subprocess.Popen[bytes]:
    """Return a VM that was started in the ordinary way."""
    return subprocess.Popen(
        pyvmm("run", "--kernel", KERNEL, *ROOT_DISK, "--disk", f"{image},queues=4", "--cpus", "2",
              "--memory", "64M", "--console", console, "--timeout", f"{patient(2 * BOOT_S):g}",
              "--append", f"quiet {run_in_guest(SCRIPT.format(warm=''))}"),
        stdin=subprocess.DEVNULL, start_new_session=True,
    )


def _end(pid: int) -> None:
    """Kill a process that somebody else reaps, and wait until it is gone."""
    until_s = time.monotonic() + patient(END_S)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, signal.SIGKILL)
            if time.monotonic() > until_s:
                raise TrialError(f"process {pid} does not end")
            time.sleep(0.005)


def run(work: Work) -> None:
    """Do what is left."""
    folder = work.scratch / "once"
    folder.mkdir()
    with Killer(folder) as killer:
        work.each(killer.kill)
    shutil.rmtree(folder)


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    return {
        "SIGKILLs, every file system clean": dict(Counter(line["kind"] for line in trials)),
        "records acknowledged, all found": sum(line["acked"] for line in trials),
    }


PART = Part(
    name="kills", about="SIGKILL of VMs whose Linux fsyncs records on ext4",
    things="SIGKILLs", size=2000, run=run, linux=True, summary=summary,
)
