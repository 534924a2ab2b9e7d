"""A run's disks: from what the user asked for to devices on the board."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence

from pyvmm.board.board import Board
from pyvmm.config import AnyDiskConfig, DiskConfig, RunConfig
from pyvmm.errors import SnapshotError
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from pyvmm.storage.frozen import FrozenDisk
    from pyvmm.virtio.block import BlockDevice

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


def check_disks(board: Board, *, into_directory: bool, to_rewind: bool = False) -> None:
    """Raise SnapshotError, naming the disk and the remedy, unless every disk can be frozen.

    A snapshot into a directory needs more of a disk, and so does one to which the machine itself
    shall be able to return.
    """
    from pyvmm.storage.freezing import check_freezable

    for device in _disks(board):
        check_freezable(device.disk, into_directory=into_directory, to_rewind=to_rewind)


def freeze_disks(board: Board) -> list[FrozenDisk]:
    """Return every disk as it is now, immutable, in order, for the caller to close.

    No device serves a request meanwhile.  The machine goes on with the same bytes; its writes do
    not change what is returned.  SnapshotError, and nothing is left to close.
    """
    from pyvmm.storage.freezing import freeze

    with contextlib.ExitStack() as stack:
        frozen = []
        for device in _disks(board):
            frozen.append(freeze(device.disk))
            stack.callback(frozen[-1].close)
        stack.pop_all()
        return frozen


def check_way_back(board: Board, frozen: Sequence[FrozenDisk]) -> None:
    """Raise SnapshotError, naming the disk and the remedy, unless ``revert_disks`` can be done."""
    from pyvmm.storage.freezing import check_revertible

    for device, disk in zip(_disks(board), frozen, strict=True):
        check_revertible(device.disk, disk)


def revert_disks(board: Board, frozen: Sequence[FrozenDisk]) -> None:
    """Give every disk the bytes of ``frozen``, which ``freeze_disks`` returned; SnapshotError.

    No device serves a request meanwhile.  ``frozen`` stays the caller's.
    """
    from pyvmm.storage.freezing import revert

    check_way_back(board, frozen)
    for device, disk in zip(_disks(board), frozen, strict=True):
        revert(device.disk, disk)


def _disks(board: Board) -> list[BlockDevice]:
    """Return the disks of ``board``, in order; SnapshotError if another process serves one."""
    from pyvmm.virtio.block import BlockDevice

    disks = []
    for slot in board.slots:
        if isinstance(slot.device, BlockDevice):
            disks.append(slot.device)
        elif slot.device.is_served_elsewhere:
            raise SnapshotError(
                slot.name, "is a disk that another process serves (vhost-user), which could "
                "change it; have pyvmm serve it: --disk FILE,snapshot"
            )
    return disks


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
