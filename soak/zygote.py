"""A process that forks VMs which go on from one snapshot, each with a disk of its own.

    python -m soak.zygote DIR

A line on standard input asks for a VM: a JSON list of the file that takes its console, the image
that takes the place of the second disk, and the overlay's file in front of that, or "".  The answer
is a line with the number of its process.  The VMs are killed by whoever asked for them; this
process reaps them, and ends at the end of its input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import NoReturn

import pyvmm

DISK = 1
LIMIT_S = 600.0


def main() -> int:
    """Command line."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    directory = sys.argv[1]
    with pyvmm.Snapshot.open(directory) as snapshot, snapshot.clone():
        pass  # all modules are loaded before the first fork: in the lab they take seconds
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _be_a_vm(directory, *json.loads(line))
        print(pid, flush=True)
    return 0


def _be_a_vm(directory: str, console: str, image: str, overlay: str) -> NoReturn:
    """Run a clone, whose end is this process's; a Snapshot is not for more than one process."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        disk = pyvmm.Overlay(image, overlay) if overlay else pyvmm.RawDisk(image)
        with (
            pyvmm.Snapshot.open(directory) as snapshot,
            snapshot.clone(console=console, disks={DISK: disk}, timeout_s=LIMIT_S) as clone,
        ):
            status = clone.run().exit_status
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
