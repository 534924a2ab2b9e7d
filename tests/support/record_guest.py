"""Boot a guest that writes and fsyncs records, and keep a log of every write and flush it makes.

    python -m tests.support.record_guest DISK RECORDS OUT VARIANT

The guest mounts DISK, an ext4 image, writes ``record N`` into file ``rN``, fsyncs it and says
``ack N``, until it is stopped after RECORDS of these.  OUT is a pickle of the recorder's initial
image and log, in which a Note N stands behind everything that was done before the host saw ``ack
N``; N is ``WRITER-NUMBER``.  VARIANT is an index into VARIANTS.
"""

from __future__ import annotations

import itertools
import pickle
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pyvmm import machine
from pyvmm.cli.parse import parse_disk
from pyvmm.config import RunConfig
from pyvmm.console.output import LineWatch
from pyvmm.console.watch import ConsoleWatch
from pyvmm.report import Reporter
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.storage import open as storage_open
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.open import DiskSource, open_backend
from tests.support.guest import KERNEL, TOOLS, run_in_guest
from tests.support.patience import patient
from tests.support.power_cut import RecordingBackend

LIMIT_S = 240.0
STOPPED = Outcome(Kind.STOPPED)


@dataclass(frozen=True, slots=True)
class Variant:
    """A guest: its writers and vCPUs, and how its disk is offered and mounted."""

    name: str
    writers: int = 1
    cpus: int = 1
    disk: str = ""
    mount: str = "-o defaults"

    @property
    def script(self) -> str:
        """Return what the guest's shell does."""
        writer = (
            "(i=0; while true; do i=$((i+1)); echo record $w-$i > /mnt/d/r$w-$i;"
            " sync /mnt/d/r$w-$i; echo ack $w-$i; done) &"
        )
        writers = " ".join(map(str, range(1, self.writers + 1)))
        return (
            f"mount -t tmpfs t /mnt; mkdir /mnt/d; mount {self.mount} /dev/vdb /mnt/d;"
            f" for w in {writers}; do {writer} done; wait"
        )


VARIANTS = (
    Variant("one writer"),
    Variant("four writers, vCPUs and queues", writers=4, cpus=4, disk=",queues=4"),
    Variant("no volatile cache", disk=",writeback=off"),
    Variant("data in the journal", writers=2, mount="-o data=journal"),
)


def record(disk: Path, records: int, variant: Variant) -> tuple[RecordingBackend, Outcome]:
    """Run the guest on ``disk`` for so many records; the recorder and the outcome."""
    acked = itertools.count(1)
    recorders: list[RecordingBackend] = []

    def open_recorded(
        source: DiskSource, *, report: Callable[[str], None], until_s: float | None = None,
        made: ExitStack | None = None,
    ) -> BlockBackend:
        backend = open_backend(source, report=report, until_s=until_s, made=made)
        if source.location != str(disk):
            return backend
        recorders.append(RecordingBackend(backend))
        return recorders[-1]

    def on_line(line: bytes) -> None:
        if match := re.fullmatch(rb"ack (\d+-\d+)", line):
            recorders[0].note(match[1].decode())
            if next(acked) == records:
                built.runner.finish(STOPPED)

    lines = LineWatch(on_line)

    class NotingWatch(ConsoleWatch):
        """The machine's own, and our notes."""

        def feed(self, data: bytes) -> None:
            lines.feed(data)
            super().feed(data)

    storage_open.open_backend = open_recorded
    machine.ConsoleWatch = NotingWatch  # type: ignore[attr-defined]
    config = RunConfig(
        kernel=KERNEL, disks=(parse_disk(f"{TOOLS},ro"), parse_disk(f"{disk}{variant.disk}")),
        append=f"quiet {run_in_guest(variant.script)}", timeout_s=patient(LIMIT_S), console="none",
        cpus=variant.cpus,
    )
    with machine.build(config, report=Reporter()) as built:
        outcome = built.run()
    return recorders[0], outcome


def main() -> int:
    """Command line; 0 if the guest was stopped after so many records."""
    disk, records, out, variant = sys.argv[1:]
    recorder, outcome = record(Path(disk), int(records), VARIANTS[int(variant)])
    Path(out).write_bytes(pickle.dumps((bytes(recorder.initial), recorder.log)))
    print(outcome)
    return outcome != STOPPED


if __name__ == "__main__":
    sys.exit(main())
