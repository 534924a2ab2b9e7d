"""A disk whose third write fails: does the guest notice, and does it go on?

    python -m examples.faulty_disk [KERNEL ROOT_IMAGE]
    pyvmm lab -- python -m examples.faulty_disk        if this host's KVM cannot run Linux

The guest boots from ROOT_IMAGE (build/root.img if not given) and writes four blocks to a second
disk, each with an fsync.  A hook counts the writes and fails the third.
"""

from __future__ import annotations

import sys

import pyvmm
from pyvmm.api.hooked_disk import DiskRequest

BLOCK, FAILING = 4096, 3
WRITE_FOUR_BLOCKS = (
    "failed=0; for n in 0 1 2 3; do"
    " echo payload $n | dd of=/dev/vdb bs=4k seek=$n count=1 conv=fsync 2>/dev/null"
    " || failed=$((failed + 1)); done; exit $failed"
)


class Faults:
    """Counts the writes to a disk, and fails one of them."""

    def __init__(self) -> None:
        self.writes = 0

    def __call__(self, request: DiskRequest) -> None:
        """Raise OSError, which gives the guest an I/O error, at the write that shall fail."""
        if request.operation == "write":
            self.writes += 1
            if self.writes == FAILING:
                raise OSError("the third write fails")


def main(kernel: str = "build/bzImage", root: str = "build/root.img") -> int:
    """Return 0 if the guest noticed one failure, and the other three blocks arrived."""
    disk = pyvmm.MemoryDisk(4 * BLOCK)
    config = pyvmm.MachineConfig(
        kernel=kernel, disks=[pyvmm.Overlay(root), disk],
        append=f'pyvmm.run="{WRITE_FOUR_BLOCKS}"', timeout_s=600,
    )
    with pyvmm.Machine(config) as machine:
        machine.on_request("vdb", Faults())
        outcome = machine.run()
    arrived = [n for n in range(4) if disk.data[n * BLOCK :].startswith(f"payload {n}".encode())]
    print(f"{outcome}; blocks that arrived: {arrived}")
    return 0 if (outcome.value, arrived) == (1, [0, 1, 3]) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
