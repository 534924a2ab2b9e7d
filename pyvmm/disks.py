"""A run's disks: from what the user asked for to a device with its interrupt and doorbells."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pyvmm.config import AnyDiskConfig, DiskConfig
from pyvmm.io_loop import IoSource
from pyvmm.lean import TYPE_CHECKING, Record
from pyvmm.outcome import Kind, Outcome
from pyvmm.report import Reporter
from pyvmm.runner import Runner
from pyvmm.slot import eventfd

if TYPE_CHECKING:
    from pyvmm.vhost_user.block import VhostUserBlock
    from pyvmm.virtio.block import BlockDevice


class Disk(Record, kw_only=False):
    """A disk's device, its interrupt and a doorbell for each of its queues: eventfds all.

    ``watch`` waits for news of the process that serves it, if that is another one; ``at_end`` is
    called when the run ends, and again before the device is closed.
    """

    device: BlockDevice | VhostUserBlock
    irq_fd: int
    doorbells: tuple[int, ...]
    watch: IoSource | None = None
    at_end: Callable[[], None] = lambda: None


def open_disk(
    config: AnyDiskConfig,
    index: int,
    runner: Runner,
    stack: contextlib.ExitStack,
    report: Reporter,
    timeout_s: float | None,
    made: contextlib.ExitStack,
) -> Disk:
    """Open disk ``index``; a server that it is on has at most ``timeout_s`` to answer.

    ``stack`` removes the files made for it, too, unless ``made`` has been emptied: once they serve
    a guest they last.
    """
    irq_fd = eventfd(stack)
    if isinstance(config, DiskConfig):
        from pyvmm.storage.open import open_backend
        from pyvmm.virtio.block import BlockDevice

        opened = open_backend(config.source, report=report, timeout_s=timeout_s, made=made)
        stack.callback(opened.close)
        stack.callback(made.close)
        device = BlockDevice(config.block, opened)
        return Disk(device, irq_fd, tuple(eventfd(stack) for _ in device.queue_max_sizes))

    from pyvmm.vhost_user.block import VhostUserBlock
    from pyvmm.vhost_user.frontend import Frontend

    def lost(reason: str) -> None:
        # Linux waits for ever for a request that nobody answers: the run is over.
        runner.finish(Outcome(Kind.HOST_ERROR, detail=f"disk {index}: {reason}"))

    frontend = Frontend.connect(config.socket, handshake_timeout_s=timeout_s)
    stack.callback(frontend.close)
    doorbells = tuple(eventfd(stack) for _ in range(config.queues))
    served = VhostUserBlock(frontend, kick_fds=doorbells, call_fd=irq_fd, lost=lost)
    return Disk(
        served, irq_fd, doorbells[: len(served.queues)], served.source, served.hurry
    )
