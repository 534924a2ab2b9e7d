"""Starts and stops of ``pyvmm``, in every way a run can end: nothing may be left of any.

Each VM has a folder, which is also its ``TMPDIR``.  After its end there are in it the files that it
was given and those it was asked to write, no socket is bound in it, and no process is left, however
far away from its parent it has put itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soak.errors import TrialError
from soak.part import Figures, Part, Trial, Work
from soak.processes import END_S, Family, left_in, pyvmm
from soak.records import RecordsGuest, new_disk
from soak.usage import Drift
from tests.support.patience import patient
from tests.support.tiny_guests import (
    REBOOT,
    REPORT_0,
    REPORT_7,
    SPIN,
    TRIPLE_FAULT,
    prints,
    write_guest,
)
from tests.support.warm_runs import WARM

SECTORS = 64
UP = b"up\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way for a VM to run and to end.

    ``options`` may name the folder as ``{0}``.  ``number``: a signal that the VM gets once its
    guest has printed something.  ``makes``: the files it leaves because it was asked to.
    """

    name: str
    status: int
    code: Sequence[bytes] = ()
    options: tuple[str, ...] = ()
    number: int = 0
    makes: frozenset[str] = frozenset()
    restores: bool = False


WAYS = (
    Way(name="reports 0", status=0, code=(REPORT_0,)),
    Way(name="reports 7, control socket", status=7, code=(prints(UP), REPORT_7),
        options=("--control", "{0}/control")),
    Way(name="SIGTERM, control socket", status=128 + signal.SIGTERM, code=(prints(UP), SPIN),
        options=("--control", "{0}/control"), number=signal.SIGTERM),
    Way(name="timeout", status=124, code=(SPIN,), options=("--timeout", "0.1")),
    Way(name="triple fault", status=122, code=(TRIPLE_FAULT,)),
    Way(name="an overlay is written", status=0,
        options=("--disk", "{0}/disk.img,overlay={0}/overlay"), makes=frozenset({"overlay"})),
    Way(name="a snapshot disk is written", status=0, options=("--disk", "{0}/disk.img,snapshot")),
    Way(name="SIGKILL", status=-signal.SIGKILL, code=(prints(UP), SPIN), number=signal.SIGKILL),
    Way(name="4 vCPUs, two disks", status=0, code=(REPORT_0,),
        options=("--cpus", "4", "--disk", "{0}/disk.img,ro,queues=4",
                 "--disk", "{0}/disk.img,ro")),
    Way(name="SIGINT, no jail", status=128 + signal.SIGINT, code=(prints(UP), SPIN),
        options=("--jail", "off"), number=signal.SIGINT),
    Way(name="reboots, console in a file", status=0, code=(prints(UP), REBOOT),
        options=("--console", "{0}/console"), makes=frozenset({"console"})),
    Way(name="a disk that is not there", status=125, code=(REPORT_0,),
        options=("--disk", "{0}/none.img")),
    Way(name="a restored snapshot", status=7, restores=True),
    Way(name="a restored snapshot, SIGTERM", status=128 + signal.SIGTERM, restores=True,
        options=("--control", "{0}/control"), number=signal.SIGTERM),
    Way(name="SIGHUP, served at the exit", status=128 + signal.SIGHUP, code=(prints(UP), SPIN),
        options=("--serve", "exit", "--disk", "{0}/disk.img,snapshot"), number=signal.SIGHUP),
)


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts VMs; ``saved`` has the directories of snapshots, by the status that they report."""

    guest: RecordsGuest
    family: Family
    saved: dict[int, Path]

    def start_and_stop(self, trial: Trial) -> Figures:
        """Do one trial."""
        way = WAYS[trial.number % len(WAYS)]
        folder = trial.folder
        new_disk(folder / "disk.img", SECTORS)
        words = self._words(way, folder)
        before = {path.name for path in folder.iterdir()}
        vm = self.family.start(words, {**os.environ, "TMPDIR": str(folder)})
        try:
            said = self._end(way, vm)
        finally:
            vm.kill()
            vm.communicate()
        if vm.returncode != way.status:
            raise TrialError(f"{way.name}: status {vm.returncode}, not {way.status}: {said!r}")
        self.family.wait_for_orphans()
        after = {path.name for path in folder.iterdir()}
        if after != before | way.makes:
            raise TrialError(f"{way.name}: files {sorted(after ^ (before | way.makes))}")
        for name in after:
            (folder / name).unlink()
        if left := left_in(str(folder)):
            raise TrialError(f"{way.name}: {left}")
        return {"way": way.name, "available_kib": _available_kib()}

    def _words(self, way: Way, folder: Path) -> list[str]:
        options = [option.format(folder) for option in way.options]
        if "--timeout" not in options:
            options += ["--timeout", f"{patient(END_S):g}"]
        if way.restores:
            return pyvmm("restore", self.saved[0 if way.number else way.status], *options)
        kernel = folder / "guest.elf"
        if way.code:
            write_guest(kernel, *way.code)
        else:
            self.guest.write(kernel, first=1, end=9, packed=False)
        return pyvmm("run", "--kernel", kernel, "--memory", "16M", *options)

    @staticmethod
    def _end(way: Way, vm: subprocess.Popen[bytes]) -> bytes:
        if way.number:
            assert vm.stdout is not None
            if not os.read(vm.stdout.fileno(), 1):
                return b"it has ended: " + vm.communicate()[1]
            vm.send_signal(way.number)
        return vm.communicate(timeout=patient(2 * END_S))[1]


def _available_kib() -> int:
    """Return how much memory the host says it could give to new processes."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0])


def save(folder: Path, code: bytes) -> Path:
    """Return the directory of a new snapshot, of a guest that will print and do ``code``."""
    saved = folder / "warm"
    if not saved.exists():
        folder.mkdir(parents=True, exist_ok=True)
        new_disk(folder / "disk.img", SECTORS)
        kernel = write_guest(folder / "guest.elf", WARM, prints(UP), code)
        subprocess.run(
            pyvmm("run", "--kernel", kernel, "--memory", "16M", "--snapshot", saved, "--disk",
                  f"{folder / 'disk.img'},snapshot", "--snapshot-exit"),
            check=True, stdin=subprocess.DEVNULL,
        )
    return saved


def run(work: Work) -> None:
    """Do what is left."""
    starter = Starter(
        RecordsGuest.assembled(work.folder), Family(),
        {0: save(work.folder / "spins", SPIN), 7: save(work.folder / "reports", REPORT_7)},
    )
    work.each(starter.start_and_stop)


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    memory = Drift.of([line for line in trials if "available_kib" in line], "available_kib")
    return {
        "ways to run and to end": str(len({line["way"] for line in trials})),
        "left behind": "no process, file or socket",
        "available memory of the host in KiB, first to last quarter": str(memory),
    }


PART = Part(
    name="starts", about="starts and stops of pyvmm run and restore in processes of their own",
    things="starts", size=5000, run=run, summary=summary,
)
