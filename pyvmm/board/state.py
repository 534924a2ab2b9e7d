"""The state of a whole machine but its RAM: vCPUs, the chips in the kernel, and the board.

Loaded only where a machine is saved or restored.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from pyvmm.board.bus import BusDevice
from pyvmm.kvm.handles import Vcpu, Vm
from pyvmm.kvm.state import forget_vcpu, settle_vcpu
from pyvmm.kvm.tsc import align, lag, offset_of, sample
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import VcpuLoop
from pyvmm.startup.types import TYPE_CHECKING, Protocol
from pyvmm.state import Fields
from pyvmm.x86 import layout

_MOST_NS, _MOST_U64 = (1 << 63) - 1, (1 << 64) - 1

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
    with _held(runner):
        on_board = board.save()
        state: dict[str, object] = {
            "board": on_board,
            "vcpus": {name: vcpu.save() for name, vcpu in _vcpus(loops).items()},
            "chips": vm.save(),
        }
        state["realtime_ns"] = time.time_ns()  # right behind kvm-clock, the last of the chips
        state["clock_ns"], state["tsc"] = sample(vm, loops[0].vcpu)
        _refuse_if_moving(runner)
        return state


def restore_machine(
    loops: Sequence[VcpuLoop],
    vm: Vm,
    board: Board,
    runner: Runner | None,
    data: object,
    *,
    clock: str = "keep",
) -> None:
    """Give a machine the state ``data``; ``runner`` runs it if it has started.

    StateError; RuntimeError if it is closed, or something moves in it.

    With ``clock`` "keep" the guest's clocks go on from the moment of the save, all but the RTC.
    With "now" they have gone on since, by as much as the host's wall clock.

    Nothing happens in the guest until ``catch_up``.  If ``data`` is refused, some parts may have
    taken theirs: the machine must not go on, but may be given another state.
    """
    _refuse_if_closed(vm, "restore()")
    if runner is not None:
        if not (runner.is_still or (runner.is_over and runner.stopped)):
            raise RuntimeError("a state is put back into a machine that is quiesced or has ended")
        for loop in loops:
            if runner.is_over:
                settle_vcpu(loop.vcpu)
            forget_vcpu(loop.vcpu)
        # KVM keeps each source's level of a line, which no chip's state has.
        vm.irq_line(layout.SERIAL_IRQ, False)
    fields = Fields("machine", data)
    vcpus, chips, on_board = (fields.take(name) for name in ("vcpus", "chips", "board"))
    saved_ns = fields.integer("realtime_ns", 0, _MOST_NS)
    saved_clock = fields.integer("clock_ns", 0, _MOST_U64), fields.integer("tsc", 0, _MOST_U64)
    fields.end()
    # Never backwards, where the host's clock was set or the snapshot comes from another host.
    advance_ns = max(0, time.time_ns() - saved_ns) if clock == "now" else 0
    by_name = _vcpus(loops)
    fields = Fields("vcpus", vcpus)
    states = {vcpu: fields.take(name) for name, vcpu in by_name.items()}
    fields.end()
    for vcpu, state in states.items():
        vcpu.restore(state, advance_ns)
    align(states)
    vm.restore(chips, advance_ns)
    # The vCPU's TSC and kvm-clock were set some time apart, and must agree again.
    if offset_of(loops[0].vcpu) is not None:
        align(states, lag(vm, loops[0].vcpu, saved_clock))
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


def _vcpus(loops: Sequence[VcpuLoop]) -> dict[str, Vcpu]:
    return {f"vcpu{loop.vcpu.index}": loop.vcpu for loop in loops}


def _refuse_if_closed(vm: Vm, call: str) -> None:
    if vm.fd < 0:
        raise RuntimeError(f"{call} needs an open machine: this one was closed")


@contextlib.contextmanager
def _held(runner: Runner | None) -> Iterator[None]:
    """Hold a quiesced machine, unless it is held already: who resumes it is obeyed afterwards."""
    _refuse_if_moving(runner)
    if runner is None or runner.is_held:
        yield
        return
    if not runner.hold("save()"):
        raise RuntimeError("save(): the run has ended meanwhile")
    try:
        yield
    finally:
        runner.let_go()


def _refuse_if_moving(runner: Runner | None) -> None:
    if runner is not None and not runner.is_still:
        raise RuntimeError("save() needs a machine that is quiesced, or has not started")
