"""Machines made, run and closed in one process, the library's way: that process must not grow."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyvmm
from soak.errors import TrialError
from soak.part import Figures, Part, Work
from soak.processes import killed_at_last
from soak.records import RecordsGuest, acknowledged, new_disk
from soak.usage import Usage, drift_figures, growth, longest
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, SPIN, prints, write_guest

RECORDS = 8
END_S = 60.0
LEAST_SAMPLES = 200
"""Below that a drift says nothing."""


class Cycle:
    """Makes, runs and closes machines, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        guest = RecordsGuest.assembled(folder)
        disk = new_disk(folder / "disk.img", 64)
        spins = write_guest(folder / "spins.elf", prints(b"up\n"), SPIN)
        reports = write_guest(folder / "reports.elf", prints(b"up\n"), REPORT_7)
        records = guest.write(folder / "records.elf", first=1, end=RECORDS + 1, packed=True)
        self._spins = self._config(spins, pyvmm.Overlay(disk))
        self._reports = self._config(reports, pyvmm.Overlay(disk)).replace(cpus=4)
        self._records = self._config(records, pyvmm.MemoryDisk(64 * 512))
        self._ways: tuple[Callable[[], None], ...] = (
            self._stopped, self._to_the_end, self._disk, self._cloned,
        )

    @staticmethod
    def _config(kernel: Path, disk: pyvmm.Overlay | pyvmm.MemoryDisk) -> pyvmm.MachineConfig:
        return pyvmm.MachineConfig(
            kernel=kernel, memory="16M", disks=[disk], timeout_s=patient(END_S)
        )

    def do(self, number: int) -> None:
        """Do one."""
        self._ways[number % len(self._ways)]()

    def _stopped(self) -> None:
        with pyvmm.Machine(self._spins) as machine:
            machine.start()
            machine.console.expect("up", timeout_s=patient(END_S))
            _expect(machine.stop(), pyvmm.Kind.STOPPED)

    def _to_the_end(self) -> None:
        with pyvmm.Machine(self._reports) as machine:
            _expect(machine.run(), pyvmm.Kind.GUEST_STATUS)

    def _disk(self) -> None:
        with pyvmm.Machine(self._records) as machine:
            _expect(machine.run(), pyvmm.Kind.GUEST_STATUS)
            acked, failed = acknowledged(machine.console.text.replace("\r", "").encode())
        if failed or acked != list(range(1, RECORDS + 1)):
            raise TrialError(f"acknowledged {acked}, not {failed}")

    def _cloned(self) -> None:
        with pyvmm.Machine(self._spins) as machine:
            machine.start()
            machine.console.expect("up", timeout_s=patient(END_S))
            machine.checkpoint()
            machine.rewind()
            snapshot = machine.snapshot()
        with snapshot, snapshot.clone() as clone:
            clone.start()
            _expect(clone.stop(), pyvmm.Kind.STOPPED)


def _expect(outcome: pyvmm.Outcome | None, kind: pyvmm.Kind) -> None:
    if outcome is None or outcome.kind is not kind:
        raise TrialError(f"ended as {outcome}")


def main() -> int:
    """In a process of its own: read numbers of trials, and write what they took."""
    cycle = Cycle(Path(sys.argv[1]))
    for line in sys.stdin:
        cycle.do(int(line))
        gc.collect()
        usage = Usage.of(0, ram_kib=0).figures()
        print(json.dumps(usage), flush=True)
    return 0


def run(work: Work) -> None:
    """Do what is left, all in one process."""
    words = [sys.executable, "-m", "soak.parts.machines", str(work.folder)]
    work.jobs = 1
    with killed_at_last(subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )) as process:
        work.each(lambda trial: {
            "stretch": work.journal.legs, **_cycle(process, trial.number),
        })
    if found := growth(longest(work.journal.trials, LEAST_SAMPLES)):
        work.leave(found)


def _cycle(process: subprocess.Popen[bytes], number: int) -> Figures:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"%d\n" % number)
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise TrialError(f"the process ended with status {process.wait()}")
    found: Figures = json.loads(answer)
    return found


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    samples = longest(trials, LEAST_SAMPLES)
    return {
        "the most in one process": str(len(samples)), **drift_figures(samples),
    }


PART = Part(
    name="machines", about="machines made, run, rewound, cloned and closed in one process",
    things="machines", size=5000, run=run, summary=summary,
)

if __name__ == "__main__":
    sys.exit(main())
