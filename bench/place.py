"""Where a request is best served: on the vCPU at the notify exit, or by the disk's thread.

    pyvmm lab -- python -m bench.place [--runs N]

4 KiB random reads of a Linux guest with one and two vCPUs, at depth 1 and 32, from memory and from
a disk that takes 0.3 ms a request, by every place of ``pyvmm run --serve``.  The
default rests on this table (docs/performance.md).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.host import KERNEL, TOOLS_IMAGE
from bench.linux_guest import SHOW_FIO, fio, fio_for, fio_jobs
from bench.process import environment
from pyvmm.config import SERVE_PLACES

DEPTHS = (1, 32)
DISKS = {"memory": "", "slow disk": ",faults={faults}"}
SLOW_MS = 0.3
DISK_BYTES = 32 << 20
SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything in turn, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args(argv).runs
    taken: dict[tuple[int, str, str], list[list[int]]] = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        disk, faults = Path(folder, "disk"), Path(folder, "faults")
        disk.write_bytes(bytes(range(256)) * (DISK_BYTES // 256))
        faults.write_text(f"read *: delay {SLOW_MS / 1000}\n", "ascii")
        for _ in range(runs):
            for cpus in (1, 2):
                for kind, options in DISKS.items():
                    for place in SERVE_PLACES:
                        given = f"{disk}{options.format(faults=faults)}"
                        taken.setdefault((cpus, kind, place), []).append(
                            _requests_per_second(given, cpus, place)
                        )
    print(f"{'vCPUs':>5}  {'disk':9}  {'--serve':7}" + "".join(f"  depth {d:>2}/s" for d in DEPTHS))
    for (cpus, kind, place), rows in taken.items():
        medians = [round(statistics.median(column)) for column in zip(*rows, strict=True)]
        print(f"{cpus:>5}  {kind:9}  {place:7}" + "".join(f"  {m:>10,}" for m in medians))


def _requests_per_second(disk: str, cpus: int, place: str) -> list[int]:
    jobs = [f"--rw=randread --bs=4k --iodepth={depth}" for depth in DEPTHS]
    script = f"{fio(jobs, fio_for(SECONDS))}; {SHOW_FIO}"
    command: list[str] = [
        sys.executable, "-m", "pyvmm", "run", "--kernel", str(KERNEL),
        "--disk", f"{TOOLS_IMAGE},ro", "--disk", disk, "--cpus", str(cpus), "--serve", place,
        "--discovery", "cmdline", "--timeout", "100",
        "--append", f'quiet pyvmm.run="{script}"',
    ]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, errors="replace", check=True
    )
    return [job.per_second for job in fio_jobs(done.stdout.replace("\r", ""), len(jobs))]


if __name__ == "__main__":
    main()
