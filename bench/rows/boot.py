"""Booting our kernel: how long until user space, and what the VMM takes beside guest RAM."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from bench.figures import BenchError, Figure, Limit
from bench.host import MEMORY_MIB, ROOT_IMAGE, Host
from bench.linux_guest import USER_SPACE, boot, mark, say
from bench.peers import Contender
from bench.suite import Reading, Suite

USER_SPACE_FIGURE = Figure(
    key="start.user_space", name="process start to the guest's first user-space line", unit="s",
    ratio=Limit("<= 0.9"),
)
MEMORY = Figure(
    key="memory", name="resident memory beyond guest RAM, guest idle", unit="MiB",
    ratio=Limit("<= 0.5"), ours=Limit("<= 25"),
)
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
SETTLE_S = 1.0


def sample_user_space(
    host: Host, contender: Contender, wanted: Collection[str]
) -> Mapping[str, Reading]:
    """As `pyvmm run` boots: with the kernel's messages on the serial console."""
    with boot(contender, root=ROOT_IMAGE, quiet=False) as vmm:
        seconds = vmm.wait_for(USER_SPACE) - vmm.started_s
        vmm.finish()
    return {USER_SPACE_FIGURE.key: Reading(seconds)}


def sample_memory(
    host: Host, contender: Contender, wanted: Collection[str]
) -> Mapping[str, Reading]:
    """Rss of the VMM's processes a second after the boot, without the mapping of guest RAM.

    Rss, not Pss: pages of libraries that the bench itself has mapped count in full.
    """
    with boot(contender, script=f"{say('idle')}; sleep 60") as vmm:
        vmm.wait_for(mark("idle"))
        time.sleep(SETTLE_S)
        kib = sum(
            rss_beyond_kib(Path("/proc", str(pid), "smaps").read_text("ascii", "replace"),
                           MEMORY_MIB << 10)
            for pid in _family(vmm.pid)
        )
    return {MEMORY.key: Reading(kib / 1024)}


def rss_beyond_kib(smaps: str, ram_kib: int) -> int:
    """KiB resident, by the text of /proc/PID/smaps, without mappings as large as guest RAM.

    BenchError if no mapping is: then it is not known what to leave out.
    """
    total = left_out = size = 0
    for line in smaps.splitlines():
        if _MAPPING.match(line):
            continue
        name, _, rest = line.partition(":")
        if name == "Size":
            size = int(rest.split()[0])
        elif name == "Rss":
            if size >= ram_kib:
                left_out += 1
            else:
                total += int(rest.split()[0])
    if smaps and not left_out:
        raise BenchError(f"no mapping has the {ram_kib >> 10} MiB of guest RAM")
    return total


def _family(pid: int) -> Iterator[int]:
    """``pid`` and its descendants."""
    yield pid
    for task in Path("/proc", str(pid), "task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _family(int(child))


USER_SPACE_SUITE = Suite(figures=(USER_SPACE_FIGURE,), sample=sample_user_space)
MEMORY_SUITE = Suite(
    figures=(MEMORY,), sample=sample_memory, max_samples=3, warm_up=False
)
