"""Boot a guest that writes and fsyncs records, and keep a log of every write and flush it makes.

    python -m tests.support.record_guest DISK SECONDS OUT

The guest mounts DISK, an ext4 image, writes ``record N`` into file ``rN``, fsyncs it and says
``ack N``, until it is stopped after SECONDS.  OUT is a pickle of the recorder's initial image and
log, in which a Note N stands behind everything that was done before the host saw ``ack N``.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pyvmm import machine
from pyvmm.cli.parse import parse_disk
from pyvmm.config import RunConfig
from pyvmm.console.output import LineWatch
from pyvmm.console.watch import ConsoleWatch
from pyvmm.report import Reporter
from pyvmm.run.outcome import Outcome
from pyvmm.storage import open as storage_open
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.open import DiskSource, open_backend
from tests.support.guest import KERNEL, TOOLS, run_in_guest
from tests.support.power_cut import RecordingBackend

SCRIPT = (
    "mount -t tmpfs t /mnt; mkdir /mnt/d; mount /dev/vdb /mnt/d; i=0; while true; do i=$((i+1));"
    " echo record $i > /mnt/d/r$i; sync /mnt/d/r$i; echo ack $i; done"
)


def record(disk: Path, seconds: float) -> tuple[RecordingBackend, Outcome]:
    """Run the guest on ``disk`` for ``seconds`` after start; the recorder and the outcome."""
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
        if match := re.fullmatch(rb"ack (\d+)", line):
            recorders[0].note(int(match[1]))

    lines = LineWatch(on_line)

    class NotingWatch(ConsoleWatch):
        """The machine's own, and our notes."""

        def feed(self, data: bytes) -> None:
            lines.feed(data)
            super().feed(data)

    storage_open.open_backend = open_recorded
    machine.ConsoleWatch = NotingWatch  # type: ignore[attr-defined]
    config = RunConfig(
        kernel=KERNEL, disks=(parse_disk(f"{TOOLS},ro"), parse_disk(str(disk))),
        append=f"quiet {run_in_guest(SCRIPT)}", timeout_s=seconds, console="none",
    )
    with machine.build(config, report=Reporter()) as built:
        outcome = built.run()
    return recorders[0], outcome


def main() -> int:
    """Command line; 0 unless the guest ended by itself."""
    disk, seconds, out = sys.argv[1:]
    recorder, outcome = record(Path(disk), float(seconds))
    Path(out).write_bytes(pickle.dumps((bytes(recorder.initial), recorder.log)))
    print(outcome)
    return outcome.exit_status != 124


if __name__ == "__main__":
    sys.exit(main())
