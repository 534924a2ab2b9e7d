"""The state of a whole machine but its RAM: vCPUs, the chips in the kernel, and the board.

Loaded only where a machine is saved or restored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyvmm.board.board import Board
from pyvmm.board.bus import Part
from pyvmm.board.consoles import Consoles
from pyvmm.kvm.handles import Vcpu, Vm
from pyvmm.state import Fields


def save_machine(vcpus: Sequence[Vcpu], vm: Vm, board: Board) -> dict[str, object]:
    """Return the state of a machine in which nothing moves; StateError, HostError.

    The board comes first: the UART takes what KVM has gathered for it, which may drive its line.
    """
    on_board = board.save()
    return {
        "board": on_board,
        "vcpus": {_name(vcpu): vcpu.save() for vcpu in vcpus},
        "chips": vm.save(),
    }


def restore_machine(vcpus: Sequence[Vcpu], vm: Vm, board: Board, data: object) -> None:
    """Give a machine that has not started the state ``data``; StateError.

    Nothing happens in the guest until ``catch_up``.  If ``data`` is refused, some parts may have
    taken theirs: the machine must not start, but may be given another state.
    """
    fields = Fields("machine", data)
    of_vcpus, of_chips, of_board = (fields.take(name) for name in ("vcpus", "chips", "board"))
    fields.end()
    # In this order: KVM gives each later vCPU the TSC of the first.
    restore_named("vcpus", {_name(vcpu): vcpu for vcpu in vcpus}, of_vcpus)
    vm.restore(of_chips)
    board.restore(of_board)


def restore_named(what: str, parts: Mapping[str, Part], data: object) -> None:
    """Give each of ``parts`` its state out of ``data``, which has all of their names and no other.

    StateError.  ``what`` is what they are together.
    """
    fields = Fields(what, data)
    states = [(part, fields.take(name)) for name, part in parts.items()]
    fields.end()
    for part, state in states:
        part.restore(state)


def catch_up(vcpus: Sequence[Vcpu], board: Board, consoles: Consoles) -> None:
    """Do what no state has, after ``restore_machine`` and right before the guest goes on.

    A doorbell that was rung before the save, an interrupt on its way through an eventfd and the
    level of the UART's line would be lost.  kvm-clock tells the guest that it was paused.
    """
    consoles.drive_line()
    for slot in board.slots:
        slot.catch_up()
    for vcpu in vcpus:
        vcpu.note_pause()


def _name(vcpu: Vcpu) -> str:
    return f"vcpu{vcpu.index}"
