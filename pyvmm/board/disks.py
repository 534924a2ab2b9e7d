"""A run's disks: from what the user asked for to a device with its interrupt and doorbells."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from pyvmm.board.slot import eventfd
from pyvmm.config import AnyDiskConfig, DiskConfig
from pyvmm.report import Reporter
from pyvmm.run.io_loop import LAST_WAIT_S, IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from pyvmm.vhost_user.block import VhostUserBlock
    from pyvmm.virtio.block import BlockDevice

START_S = 30.0
"""How long all that serve a run's disks, together, may take to agree on them."""


class Disk(Record, kw_only=False):
    """A disk's device, its interrupt and a doorbell for each of its queues: eventfds all.

    ``watch`` waits for news of the process that serves it, if that is another one; ``hurry`` lets
    no wait for a process or host last beyond a time (time.monotonic), from any thread.
    """

    device: BlockDevice | VhostUserBlock
    irq_fd: int
    doorbells: tuple[int, ...]
    watch: IoSource | None = None
    hurry: Callable[[float], None] = lambda until_s: None


class LastWait:
    """To be called when the run ends, and again before the devices are closed: from the first
    call on, all ``disks`` together are waited for LAST_WAIT_S."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        self._disks = disks
        self._has_begun = False

    def __call__(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        until_s = time.monotonic() + LAST_WAIT_S
        for disk in self._disks:
            disk.hurry(until_s)


def open_disk(
    config: AnyDiskConfig,
    index: int,
    runner: Runner,
    stack: contextlib.ExitStack,
    report: Reporter,
    until_s: float,
    made: contextlib.ExitStack,
) -> Disk:
    """Open disk ``index``; whoever serves it has until ``until_s`` (time.monotonic) to agree.

    ``stack`` removes the files made for it, too, unless ``made`` has been emptied: once they serve
    a guest they last.
    """
    irq_fd = eventfd(stack)
    if isinstance(config, DiskConfig):
        from pyvmm.virtio.block import BlockDevice

        opened = config.source.open(report=report, until_s=until_s, made=made)
        stack.callback(opened.close)
        stack.callback(made.close)
        device = BlockDevice(config.block, opened)
        doorbells = tuple(eventfd(stack) for _ in device.queue_max_sizes)
        return Disk(device, irq_fd, doorbells, hurry=opened.hurry)

    from pyvmm.vhost_user.block import VhostUserBlock
    from pyvmm.vhost_user.frontend import Frontend

    def lost(reason: str) -> None:
        # Linux waits for ever for a request that nobody answers: the run is over.
        runner.finish(Outcome(Kind.HOST_ERROR, detail=f"disk {index}: {reason}"))

    frontend = Frontend.connect(config.socket, latest_s=until_s)
    stack.callback(frontend.close)
    doorbells = tuple(eventfd(stack) for _ in range(config.queues))
    served = VhostUserBlock(frontend, kick_fds=doorbells, call_fd=irq_fd, lost=lost)
    frontend.limit_waits(float("inf"))  # the disk stands
    return Disk(
        served, irq_fd, doorbells[: len(served.queues)], served.source, served.hurry
    )
