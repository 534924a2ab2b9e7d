"""The state of a whole machine but its RAM: vCPUs, the chips in the kernel, and the board.

Loaded only where a machine is saved or restored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from pyvmm.board.bus import BusDevice
from pyvmm.kvm.handles import Vm
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import VcpuLoop
from pyvmm.startup.types import TYPE_CHECKING, Protocol
from pyvmm.state import Fields

if TYPE_CHECKING:
    from pyvmm.board.board import Board
    from pyvmm.board.consoles import Consoles
    from pyvmm.board.slot import Slot


class Part(Protocol):
    """A part of a machine with a state of its own (docs/architecture.md, "State")."""

    def save(self) -> dict[str, object]:
        """Return the state as plain data; StateError if there is none to give."""

    def restore(self, data: object) -> None:
        """Take what ``save`` of such a part returned; StateError."""


class Chip(BusDevice, Part, Protocol):
    """A device with ``LENGTH`` ports, and a state."""

    LENGTH: int


def save_machine(
    loops: Sequence[VcpuLoop], vm: Vm, board: Board, runner: Runner | None
) -> dict[str, object]:
    """Return the state of a machine, which ``runner`` runs if it has started.

    StateError; RuntimeError if it is closed, or something moves in it.  The board comes first: the
    UART takes what KVM has gathered for it, which may drive its line.
    """
    _refuse_if_closed(vm, "save()")
    _refuse_if_moving(runner)
    on_board = board.save()
    state = {
        "board": on_board,
        "vcpus": {name: vcpu.save() for name, vcpu in _vcpus(loops).items()},
        "chips": vm.save(),
    }
    _refuse_if_moving(runner)
    return state


def restore_machine(
    loops: Sequence[VcpuLoop], vm: Vm, board: Board, has_begun: bool, data: object
) -> None:
    """Give a machine the state ``data``; StateError, RuntimeError if it is closed or has started.

    Nothing happens in the guest until ``catch_up``.  If ``data`` is refused, some parts may have
    taken theirs: the machine must not start, but may be given another state.
    """
    _refuse_if_closed(vm, "restore()")
    if has_begun:
        raise RuntimeError("restore() comes before start() and run()")
    fields = Fields("machine", data)
    vcpus, chips, on_board = (fields.take(name) for name in ("vcpus", "chips", "board"))
    fields.end()
    # In this order: KVM gives each later vCPU the TSC of the first.
    restore_named("vcpus", _vcpus(loops), vcpus)
    vm.restore(chips)
    board.restore(on_board)


def catch_up(loops: Sequence[VcpuLoop], board: Board, consoles: Consoles) -> None:
    """Do what no state has, after ``restore_machine`` and right before the guest goes on.

    Otherwise a doorbell that was rung before the save, an interrupt on its way through an eventfd
    and the level of the UART's line would be lost.  So each queue of an active device is served
    once, its driver gets one interrupt, and each device looks at the host.  A clone learns that it
    is one.  kvm-clock tells the guest that it was paused.
    """
    consoles.uart.drive_line()
    for slot in board.slots:
        if slot.device.is_activated:
            for queue in range(len(slot.doorbells)):
                slot.serve(queue)
            os.eventfd_write(slot.irq_fd, 1)
        slot.refresh()
    board.vmgenid.notify()
    for loop in loops:
        loop.vcpu.note_pause()


def save_board(board: Board) -> dict[str, object]:
    """See ``Board.save``."""
    return {
        "parts": {name: part.save() for name, part in board.parts.items()},
        "slots": {slot.name: slot.save() for slot in board.slots},
    }


def restore_board(board: Board, data: object) -> None:
    """See ``Board.restore``."""
    fields = Fields("board", data)
    parts, slots = fields.take("parts"), fields.take("slots")
    fields.end()
    # The slots first: a device resets before it takes its state, and a part may follow that.
    restore_named("slots", {slot.name: slot for slot in board.slots}, slots)
    restore_named("parts", board.parts, parts)


def save_slot(slot: Slot) -> dict[str, object]:
    """See ``Slot.save``."""
    return {"base": slot.base, "gsi": slot.gsi, "transport": slot.transport.save()}


def restore_slot(slot: Slot, data: object) -> None:
    """See ``Slot.restore``."""
    fields = Fields(f"slot {slot.name}", data)
    for name, own in ("base", slot.base), ("gsi", slot.gsi):
        if fields.take(name) != own:
            raise fields.error(name, f"is not {own:#x}: here the device has another place")
    transport = fields.take("transport")
    fields.end()
    slot.transport.restore(transport)


def restore_named(what: str, parts: Mapping[str, Part], data: object) -> None:
    """Give each of ``parts`` its state out of ``data``, which has all of their names and no other.

    StateError.  ``what`` is what they are together.
    """
    fields = Fields(what, data)
    states = [(part, fields.take(name)) for name, part in parts.items()]
    fields.end()
    for part, state in states:
        part.restore(state)


def _vcpus(loops: Sequence[VcpuLoop]) -> dict[str, Part]:
    return {f"vcpu{loop.vcpu.index}": loop.vcpu for loop in loops}


def _refuse_if_closed(vm: Vm, call: str) -> None:
    if vm.fd < 0:
        raise RuntimeError(f"{call} needs an open machine: this one was closed")


def _refuse_if_moving(runner: Runner | None) -> None:
    if runner is not None and not runner.is_still:
        raise RuntimeError("save() needs a machine that is quiesced, or has not started")
