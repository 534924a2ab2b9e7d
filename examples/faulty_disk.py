"""A disk whose third read fails: does the guest notice, and does it go on?

    python -m examples.faulty_disk [KERNEL ROOT_IMAGE]
    pyvmm lab -- python -m examples.faulty_disk        if this host's KVM cannot run Linux

The guest boots from ROOT_IMAGE (build/root.img if not given) and reads a second disk four times,
a sector each.  A hook counts the reads of one sector and fails the third.
"""

from __future__ import annotations

import sys

import pyvmm
from pyvmm.api.hooked_disk import DiskRequest

SECTOR, FAILING = 512, 3
READ_FOUR_TIMES = (
    # The page cache would read more at once, and keep it.
    "for n in 0 1 2 3; do dd if=/dev/vdb bs=512 skip=$n count=1 iflag=direct 2>/dev/null; done"
)


class Faults:
    """Counts the reads of a disk, and fails one of them."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, request: DiskRequest) -> None:
        """Raise OSError, which gives the guest an I/O error, at the read that shall fail."""
        if request.operation == "read" and request.length == SECTOR:
            self.reads += 1
            if self.reads == FAILING:
                raise OSError("the third read fails")


def main(kernel: str = "build/bzImage", root: str = "build/root.img") -> int:
    """Return 0 if the guest got the other three reads."""
    content = b"".join(f"payload {n}\n".encode().ljust(SECTOR) for n in range(8))
    config = pyvmm.MachineConfig(
        kernel=kernel, disks=[pyvmm.Overlay(root), pyvmm.MemoryDisk(content)],
        append=f'pyvmm.run="{READ_FOUR_TIMES}"', timeout_s=600,
    )
    with pyvmm.Machine(config) as machine:
        machine.on_request(1, Faults())
        outcome = machine.run()
        arrived = [n for n in range(4) if f"payload {n}" in machine.console.text]
    print(f"{outcome}; sectors that arrived: {arrived}")
    return 0 if len(arrived) == 3 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
