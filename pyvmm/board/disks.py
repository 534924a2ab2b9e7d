"""A run's disks: from what the user asked for to devices on the board."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable

from pyvmm.board.board import Board
from pyvmm.config import AnyDiskConfig, DiskConfig, RunConfig
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.virtio.device import VirtioDevice

START_S = 30.0
"""How long all that serve a run's disks, together, may take to agree on them."""


def plug_disks(
    board: Board,
    config: RunConfig,
    runner: Runner,
    stack: contextlib.ExitStack,
    report: Callable[[str], None],
) -> contextlib.ExitStack:
    """Open the disks of ``config`` and plug them into ``board``, in order.

    ``stack`` closes them, and removes the files that were made for them.  Empty the stack that is
    returned to keep these files: once they serve a guest they last.
    """
    made = contextlib.ExitStack()
    until_s = time.monotonic() + min(START_S, config.timeout_s or START_S)
    for index, disk in enumerate(config.disks):
        device = _open_disk(disk, index, runner, stack, report, until_s, made)
        board.plug(device, f"virtio{index}", at_exit=config.serve == "exit")
    return made


def _open_disk(
    config: AnyDiskConfig,
    index: int,
    runner: Runner,
    stack: contextlib.ExitStack,
    report: Callable[[str], None],
    until_s: float,
    made: contextlib.ExitStack,
) -> VirtioDevice:
    """Open disk ``index``; whoever serves it has until ``until_s`` (time.monotonic) to agree.

    ``made`` gets what removes the files made for it.
    """
    if isinstance(config, DiskConfig):
        from pyvmm.virtio.block import BlockDevice

        opened = config.source.open(report=report, until_s=until_s, made=made)
        stack.callback(opened.close)
        stack.callback(made.close)
        return BlockDevice(config.block, opened)

    from pyvmm.vhost_user.block import VhostUserBlock
    from pyvmm.vhost_user.frontend import Frontend

    frontend = Frontend.connect(config.socket, latest_s=until_s)
    stack.callback(frontend.close)
    device = VhostUserBlock(
        frontend, max_queues=config.queues, lost=functools.partial(_lose, runner, index)
    )
    frontend.limit_waits(float("inf"))  # the disk stands
    return device


def _lose(runner: Runner, index: int, reason: str) -> None:
    """End the run: Linux waits for ever for a request that nobody answers."""
    runner.finish(Outcome(Kind.HOST_ERROR, detail=f"disk {index}: {reason}"))
