"""Boot a kernel and print which ports it uses, how often, and what it wrote there last.

    python -m examples.trace_ports [KERNEL [APPEND]]
    pyvmm lab -- python -m examples.trace_ports        if this host's KVM cannot run Linux

KERNEL is build/bzImage if not given.  The hook only watches: it returns None, so each access goes
on to the device.  The interrupt chips and the timer are in KVM, so their ports are not seen.
"""

from __future__ import annotations

import collections
import sys

import pyvmm
from pyvmm.api.hooked_bus import Access


def main(kernel: str = "build/bzImage", append: str = "panic=-1") -> int:
    """Return the exit status that ``pyvmm run`` would have."""
    reads: collections.Counter[int] = collections.Counter()
    writes: collections.Counter[int] = collections.Counter()
    last: dict[int, int] = {}

    def watch(access: Access) -> None:
        if access.value is None:
            reads[access.address] += 1
        else:
            writes[access.address] += 1
            last[access.address] = access.value

    config = pyvmm.MachineConfig(kernel=kernel, append=append, timeout_s=600)
    with pyvmm.Machine(config) as machine:
        machine.on_port(range(0x10000), watch)
        outcome = machine.run()
    for port in sorted(reads | writes):
        wrote = f", {writes[port]} writes, the last {last[port]:#x}" if port in last else ""
        print(f"port {port:#06x}: {reads[port]} reads{wrote}")
    print(outcome)
    return outcome.exit_status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
