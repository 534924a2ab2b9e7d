"""Guests of a few instructions on this host's own /dev/kvm: starting, and the exit loop."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Collection, Mapping

from bench.figures import BenchError, Figure, Limit
from bench.host import MEMORY_MIB, Host
from bench.peers import Contender
from bench.process import Watched
from bench.suite import Reading, Suite

TIMEOUT_S = 60.0
START = Figure(
    key="start.instruction", name="process start to first guest instruction (bare guest)",
    unit="ms", ratio=Limit("<= 0.8"),
)
EXITS = Figure(
    key="bare.exits", name="MMIO exits of a bare guest, to no device", unit="exits/s",
    ratio=Limit(">= 0.95"),
)
DEVICE_EXITS = Figure(
    key="bare.exits.device", name="MMIO exits of a bare guest, to a virtio-mmio register",
    unit="exits/s",
)
IN_C = Contender(name="the same loop in C")

NOWHERE = 0xE000_0000
QUEUE_SEL = 0xD000_0030
"""A register of the first disk whose writing does next to nothing."""
FEW, MANY = 2_000, 42_000


def sample_start(
    host: Host, contender: Contender, wanted: Collection[str]
) -> Mapping[str, Reading]:
    """From before the process is there to its first guest instruction, or to its ready message.

    Not the end of the process: taking a machine down is no part of starting it.
    """
    guest = host.guest("first_instruction")
    command = contender.command("start", kernel=guest, memory=MEMORY_MIB)
    if mark := contender.lines.get("started"):
        with Watched(command, timeout_s=TIMEOUT_S) as process:
            seconds = process.wait_for(mark.encode()) - process.started_s
    else:
        seconds = until_first_run(host, command)
    return {START.key: Reading(seconds * 1e3)}


def until_first_run(host: Host, command: list[str]) -> float:
    """Seconds until the first KVM_RUN came back, by the process's own clock."""
    reader, writer = os.pipe()
    try:
        extra = {"LD_PRELOAD": str(host.preload("first_run")), "FIRST_RUN_FD": str(writer)}
        with Watched(
            command, timeout_s=TIMEOUT_S, pass_fds=[writer], extra_environment=extra
        ) as process:
            process.finish()
            if not select.select([reader], [], [], 0)[0]:
                raise process.failure("ran no guest")
            return int(os.read(reader, 64)) / 1e9 - process.started_s
    finally:
        os.close(reader)
        os.close(writer)


def sample_exits(
    host: Host, contender: Contender, wanted: Collection[str]
) -> Mapping[str, Reading]:
    """Exits a second, by what a long run takes more than a short one: neither start nor end."""
    readings = {}
    for key, address in ((EXITS.key, NOWHERE), (DEVICE_EXITS.key, QUEUE_SEL)):
        if key not in wanted:
            continue
        took_s = [_exit_seconds(host, contender, address, count) for count in (FEW, MANY)]
        readings[key] = Reading((MANY - FEW) / (took_s[1] - took_s[0]))
    return readings


def _exit_seconds(host: Host, contender: Contender, address: int, count: int) -> float:
    if contender is IN_C:
        guest = host.guest("mmio_loop", flat=True, ADDRESS=address, COUNT=count)
        command = [str(host.program("mmio_exits")), str(guest)]
    else:
        guest = host.guest("mmio_loop", ADDRESS=address, COUNT=count)
        parts = ["start", "data"] if address == QUEUE_SEL else ["start"]
        command = contender.command(*parts, kernel=guest, memory=MEMORY_MIB, data=host.disk())
    with Watched(command, timeout_s=TIMEOUT_S) as process:
        said = process.finish()
        if process.wait():
            raise process.failure("failed")
        took_s = time.monotonic() - process.started_s
    if contender is IN_C:
        seen = re.search(r"exits (\d+)", said)
        if seen is None or int(seen[1]) != count + 1:
            raise BenchError(f"the loop in C said {said.strip()!r} for {count} stores")
    return took_s


START_SUITE = Suite(figures=(START,), sample=sample_start, boots_linux=False, repeats=8)


def exits_suite(pyvmm: Contender) -> Suite:
    """``pyvmm`` beside the loop in C."""
    return Suite(
        figures=(EXITS, DEVICE_EXITS), sample=sample_exits, contenders=(pyvmm, IN_C),
        boots_linux=False, repeats=3,
    )
