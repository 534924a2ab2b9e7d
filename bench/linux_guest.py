"""A Linux guest under any VMM of ``peers.toml``: same kernel, same images, same command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.figures import BenchError
from bench.host import KERNEL, MEMORY_MIB, TOOLS_IMAGE
from bench.peers import Contender
from bench.process import Watched

TIMEOUT_S = 120.0
USER_SPACE = b"pyvmm-init: user space reached"
CMDLINE = "console=ttyS0 reboot=k panic=-1 root=/dev/vda ro"
LIMIT_BYTES = 2000
"""Of a guest's command line; the kernel takes 2047, and a VMM adds its devices."""


def boot(
    contender: Contender,
    *extra: str,
    root: Path = TOOLS_IMAGE,
    script: str = "",
    quiet: bool = True,
    **values: object,
) -> Watched:
    """Start ``contender`` with our kernel; its init runs ``script`` and then ends the machine.

    ``extra`` names more templates of the contender, ``values`` are for their placeholders.
    """
    if '"' in script:
        raise ValueError("a kernel command line cannot quote double quotes")
    append = f"{CMDLINE}{' quiet' if quiet else ''}"
    if script:
        append += f' pyvmm.run="{script}"'
    if len(append) > LIMIT_BYTES:
        raise ValueError(f"{len(append)} bytes are too many for a command line: {script}")
    for image in (KERNEL, root):
        if not image.exists():
            raise BenchError(f"{image} is not there; `make kernel image build/tools.img` makes it")
    command = contender.command(
        "command", *extra, kernel=KERNEL, memory=MEMORY_MIB, root=root, append=append, **values
    )
    return Watched(command, timeout_s=TIMEOUT_S)


def mark(word: str) -> bytes:
    """What ``say(word)`` in a script puts on the console: at a line's start, unlike the script."""
    return f"\nbench: {word}\r".encode()


def say(word: str) -> str:
    """Shell text that makes a mark."""
    return f"echo bench: {word}"


def fio_for(seconds: float) -> str:
    """fio's options for so long; it counts whole seconds."""
    return f"--time_based --runtime={max(1, round(seconds))}"


def fio(jobs: Sequence[str], how_long: str) -> str:
    """Shell text that runs ``jobs``, fio's options of one each, after one another on /dev/vdb.

    fio is told to spend as little as it can itself, since all of it is the same for every VMM and
    only dilutes what differs: no clock reading for latencies, no map of the blocks it has been to.
    Its terse lines are in /mnt/fio afterwards; ``SHOW_FIO`` prints them.
    """
    common = (
        "--minimal --output=/mnt/fio --eta=never --aux-path=/mnt --filename=/dev/vdb --direct=1"
        " --thread --ioengine=libaio --gtod_reduce=1 --norandommap --randrepeat=1"
    )
    each = " ".join(f"--name=j{number} --stonewall {job}" for number, job in enumerate(jobs))
    return f"mount -t tmpfs t /mnt; fio {common} {how_long} {each}"


SHOW_FIO = "cat /mnt/fio"


class FioJob:
    """One terse line of fio (version 3 of the format, ``fio --minimal``; HOWTO, *Terse output*)."""

    _FIELDS, _READ, _WRITE = 80, 5, 46

    def __init__(self, line: str) -> None:
        fields = line.split(";")
        if len(fields) < self._FIELDS or fields[0] != "3":
            raise BenchError(f"fio said: {line[:200]}")
        if fields[4] != "0":
            raise BenchError(f"fio ended with error {fields[4]}")
        read, write = fields[self._READ :][:4], fields[self._WRITE :][:4]
        total_kib, bandwidth, iops, _ = (
            int(one) + int(other) for one, other in zip(read, write, strict=True)
        )
        self.kib = total_kib
        self.kib_per_second = bandwidth
        self.per_second = iops


def fio_jobs(console: str, count: int) -> list[FioJob]:
    """The ``count`` results in ``console``; BenchError if there are not as many."""
    lines = [line for line in console.splitlines() if line.startswith("3;fio-")]
    if len(lines) != count:
        tail = " | ".join(console.strip().splitlines()[-4:])
        raise BenchError(f"{len(lines)} of {count} fio results; the console ends: {tail[-400:]}")
    return [FioJob(line) for line in lines]
