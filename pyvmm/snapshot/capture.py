"""Take a snapshot of a machine: refuse, hold the guest still, freeze, save, copy RAM, go on."""

from __future__ import annotations

import contextlib
import os

from pyvmm.board.disks import check_disks, freeze_disks
from pyvmm.errors import HostError, SnapshotError
from pyvmm.machine import Machine
from pyvmm.ram.image import MOST_LAYERS
from pyvmm.ram.write import image_in_memory
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.files.content import About
from pyvmm.snapshot.files.writer import Writer
from pyvmm.snapshot.snapshot import Facts, Snapshot
from pyvmm.snapshot.still import one_moment, state_of, still
from pyvmm.snapshot.writing import LiveImage, WrittenRam, finish_directory, host_of
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.virtio.spec import DeviceType

CALL = "snapshot()"


def take(
    machine: Machine,
    directory: str | os.PathLike[str] | None = None,
    *,
    live: bool = False,
    diff: bool = False,
) -> Snapshot:
    """Return a snapshot of ``machine``, for the caller to close.

    It is in memory, or in ``directory``, which is made.  The guest is held still meanwhile; what
    ran runs on afterwards, what was paused stays so, also after an error.  With ``live`` a child
    process copies RAM, and the guest stands only until it is forked.  A ``diff`` into a directory
    has only the pages that differ from the snapshot from which the machine goes on.

    SnapshotError for a machine that cannot be saved, or a directory that cannot be made; where
    that can be known, before the guest is paused.  HostError.
    """
    with one_moment(machine, CALL):
        base = check(machine, directory, diff=diff)
        if directory is None:
            snapshot = _take_in_memory(machine, live)
        else:
            with Writer(directory) as writer:
                snapshot = _take_into(machine, writer, live, base)
        with machine.lock:
            if machine.vm.fd >= 0:  # else it was closed while RAM was written
                old, machine.newest = machine.newest, snapshot.share()
                if old is not None:
                    old.close()
    return snapshot


def check(
    machine: Machine, directory: str | os.PathLike[str] | None, *, diff: bool = False
) -> Snapshot | None:
    """Raise SnapshotError if ``machine`` cannot be saved; it may run, or not have started.

    Return the snapshot under a ``diff``, None without one.
    """
    check_disks(machine.board, into_directory=directory is not None)
    for slot in machine.board.slots:
        if slot.name in machine.own_devices and slot.device.device_type == DeviceType.BLOCK:
            raise SnapshotError(
                f"device {slot.name}", "is a disk of the script's own; a disk that can be saved is "
                "one of MachineConfig.disks"
            )
        if slot.device.is_served_elsewhere:
            raise SnapshotError(
                f"device {slot.name}", "another process serves it, and has a state of its own"
            )
    if machine.board.memory.fd is not None:
        raise SnapshotError(CALL, "another process shares the guest's RAM, and may write it")
    if not diff:
        return None
    base = machine.base
    if directory is None or not isinstance(base, Snapshot) or base.path is None:
        raise SnapshotError(
            CALL, "a diff is a directory over another one: it needs a machine that was restored "
            "from a snapshot's directory, and a directory to be made"
        )
    if len(base.image.layers) >= MOST_LAYERS:
        raise SnapshotError(
            CALL, f"{base.path} is a chain of {MOST_LAYERS} snapshots, the longest there may be; "
            "take a whole one, or merge: pyvmm snapshot merge"
        )
    return base


def _take_in_memory(machine: Machine, live: bool) -> Snapshot:
    memory = machine.board.memory
    with contextlib.ExitStack() as undo:
        forked: LiveImage | None = None
        with still(machine, CALL):
            disks = _freeze(machine, undo)
            facts = _facts(machine, About.new(live=live))
            if live:
                forked = undo.enter_context(LiveImage(memory))
            else:
                image = image_in_memory(memory)
                undo.callback(image.close)
                _go_on_over(machine, snapshot := Snapshot(facts, image, disks))
        if forked is not None:
            snapshot = Snapshot(facts, forked.finish(), disks)
        undo.pop_all()
        return snapshot


def _take_into(
    machine: Machine, writer: Writer, live: bool, base: Snapshot | None
) -> Snapshot:
    about, memory = About.new(live=live), machine.board.memory
    with contextlib.ExitStack() as undo:
        with still(machine, CALL):
            disks = _freeze(machine, undo)
            facts, host = _facts(machine, about), host_of(machine)
            ram = undo.enter_context(
                WrittenRam(memory, writer, live=live, over=None if base is None else base.image)
            )
        image = finish_directory(writer, about, host, facts, ram, disks, base)
        undo.pop_all()
        ram.close()
        return Snapshot(facts, image, disks, writer.path)


def _freeze(machine: Machine, undo: contextlib.ExitStack) -> list[FrozenDisk]:
    """Freeze the machine's disks, which go on with new layers; ``undo`` gives the frozen ones up.
    """
    disks = freeze_disks(machine.board)
    for disk in disks:
        undo.callback(disk.close)
    return disks


def _facts(machine: Machine, about: About) -> Facts:
    """Return all of the machine but RAM and disks; SnapshotError if a part has no state to give."""
    return Facts(
        id=about.id, made_ns=about.made_ns, is_live=about.is_live,
        config=machine.config, kernel=machine.kernel,
        cpuid=tuple(loop.vcpu.cpuid for loop in machine.loops),
        own_devices=machine.own_devices, state=state_of(machine, CALL),
    )


def _go_on_over(machine: Machine, snapshot: Snapshot) -> None:
    """Map the machine's RAM over the image that was just made of it, so that it can go back."""
    try:
        machine.board.memory.map_image(snapshot.image)
    except HostError as error:  # RAM is lost
        machine.runner.finish(Outcome(Kind.HOST_ERROR, detail=str(error)))
        raise
    old, machine.base = machine.base, snapshot.share()
    if old is not None:
        old.close()
