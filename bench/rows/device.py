"""The device alone: a vhost-user back end under one C ring driver, on a file in memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping

from bench.figures import BenchError, Figure, Limit
from bench.host import Host
from bench.peers import Contender
from bench.process import environment, serving
from bench.suite import Reading, Suite

DEPTH_32 = {
    "device.read.d32": ("read", "random"),
    "device.write.d32": ("write", "random"),
    "device.sequential.d32": ("read", "sequential"),
}
DEPTH_1 = {
    "device.read.d1": ("read", "random"),
    "device.write.d1": ("write", "random"),
}
FIGURES = (
    Figure(key="device.read.d32", name="device alone, 4 KiB random read, depth 32",
           unit="requests/s", ratio=Limit(">= 2.0")),
    Figure(key="device.write.d32", name="device alone, 4 KiB random write, depth 32",
           unit="requests/s", ratio=Limit(">= 2.0")),
    Figure(key="device.sequential.d32", name="device alone, 4 KiB sequential read, depth 32",
           unit="requests/s"),
    # 1 / the median latency, so that more is better here too.
    Figure(key="device.read.d1", name="device alone, 4 KiB random read, depth 1, median",
           unit="requests/s", ratio=Limit(">= 1.0")),
    Figure(key="device.write.d1", name="device alone, 4 KiB random write, depth 1, median",
           unit="requests/s", ratio=Limit(">= 1.0")),
)
_ANSWER = re.compile(
    r"requests (\d+) seconds ([\d.]+) median_ns (\d+) p99_ns (\d+) indirect (\d) event_idx (\d)\n"
)


def sample(host: Host, contender: Contender, wanted: Collection[str]) -> Mapping[str, Reading]:
    """One start of the daemon; each figure is a connection of its own."""
    driver, disk, socket = host.program("ring_driver"), host.disk(), host.scratch / "device.sock"
    readings = {}
    with serving(contender.command("command", disk=disk, socket=socket), socket) as daemon:
        for key, (direction, order) in {**DEPTH_32, **DEPTH_1}.items():
            if key not in wanted:
                continue
            depth = 32 if key in DEPTH_32 else 1
            try:
                readings[key] = _drive(
                    [str(driver), str(socket), direction, order, str(depth), str(host.seconds / 2)]
                )
            except BenchError as error:
                raise daemon.failure(f"under load: {error}") from error
    return readings


def _drive(command: list[str]) -> Reading:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, env=environment()
        )
    except subprocess.TimeoutExpired:
        raise BenchError("the ring driver does not end") from None
    found = _ANSWER.fullmatch(done.stdout)
    if done.returncode or found is None:
        raise BenchError((done.stderr or done.stdout).strip() or f"status {done.returncode}")
    requests, seconds, median_ns = int(found[1]), float(found[2]), int(found[3])
    per_second = 1e9 / median_ns if command[4] == "1" else requests / seconds
    lacking = [name for name, had in (("INDIRECT_DESC", found[5]), ("EVENT_IDX", found[6]))
               if had == "0"]
    return Reading(per_second, f"without {' and '.join(lacking)}" if lacking else "")


SUITE = Suite(figures=FIGURES, sample=sample, kind="daemon", boots_linux=False, repeats=2)
