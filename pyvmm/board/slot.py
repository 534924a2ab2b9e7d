"""A slot of the board: one virtio device, and all that it needs of the machine.

Two things are decided here.  How the guest sees the register page: *mapped*, as read-only memory,
so that reading registers never leaves the guest and of the writes only those of set-up do; or
*trapped*, where every access is an exit.  And where a notification is served: *at the exit*, by
the vCPU that wrote it, or by the device's *thread*, behind an ioeventfd (docs/performance.md has
the figures that make the rule).

There is one way for the host to tell the driver that something changed: ``Slot.refresh`` wakes the
device's thread, the thread has the device look at the host, and the driver is interrupted if the
device says that its configuration space is another.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

from pyvmm.kvm.handles import Vm
from pyvmm.memory import GuestMemory
from pyvmm.run.io_loop import IoSource
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import InterruptBit, Register
from pyvmm.x86 import layout


class Slot:
    """Slot ``index``: ``device`` behind a register page at ``base``, interrupting by line ``gsi``.

    The slot owns the device's eventfds and the device, and closes them; ``page`` is the board's.
    A thread called ``name`` has to serve ``sources``.  ``serve`` and ``refresh`` may be called from
    any thread.

    With ``keep_used`` InterruptStatus always says that there are used buffers, so that nobody need
    see its acknowledgement.  ``at_exit`` says where notifications are served; a device that is
    served elsewhere has its doorbells in any case.

    A slot is made, connected and closed, in this order (``board.Board`` says why).
    """

    def __init__(
        self,
        index: int,
        device: VirtioDevice,
        name: str,
        memory: GuestMemory,
        *,
        page: memoryview,
        keep_used: bool,
        at_exit: bool,
        report: Callable[[str], None],
    ) -> None:
        self.index = index
        self.device = device
        self.name = name
        self.base, self.gsi = layout.virtio_slot(index)
        with contextlib.ExitStack() as stack:
            stack.callback(device.close)
            self.irq_fd = eventfd(stack)
            self.doorbells = tuple(eventfd(stack) for _ in device.queues)
            self._news_fd = eventfd(stack)
            own_sources = device.plug(self)
            self.transport = MmioTransport(
                device, memory, functools.partial(os.eventfd_write, self.irq_fd, 1),
                report=lambda line: report(f"{name}: {line}"),
                # The thread does what a notification served at the exit leaves undone.
                defer=self.serve,
                keep_used=keep_used or device.is_served_elsewhere, page=page,
            )
            stack.callback(self.transport.close)
            self._resources = stack.pop_all()
        is_served_here = not device.is_served_elsewhere
        self._has_ioeventfds = not (at_exit and is_served_here)
        self.sources = [IoSource(self._news_fd, self._look), *own_sources]
        if is_served_here:
            # Straight to the transport: nothing of the slot is called at a doorbell.
            self.sources += [
                IoSource(doorbell, functools.partial(self.transport.service, queue))
                for queue, doorbell in enumerate(self.doorbells)
            ]

    # The slot as its device sees it (virtio.device.Plug)

    def serve(self, queue_index: int) -> None:
        """See ``Plug.serve``."""
        os.eventfd_write(self.doorbells[queue_index], 1)

    def refresh(self) -> None:
        """See ``Plug.refresh``."""
        os.eventfd_write(self._news_fd, 1)

    def _look(self) -> None:
        """Have the device look at the host, and tell the driver; on the device's thread."""
        if self.device.refresh():
            self.transport.config_changed()

    # The slot as a saved machine has it (docs/architecture.md, "State")

    def save(self) -> dict[str, object]:
        """Return the slot's place and its transport's state; StateError."""
        from pyvmm.board import state  # not on the boot path

        return state.save_slot(self)

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        from pyvmm.board import state

        state.restore_slot(self, data)

    # The slot as KVM sees it

    def connect(self, vm: Vm, ignored_ack_fd: int | None) -> None:
        """Have KVM take interrupts from our eventfds, and notifications to them; once.

        ``ignored_ack_fd`` is an eventfd that nobody reads: KVM writes it in place of an exit when
        the driver acknowledges used buffers.  None makes every acknowledgement an exit.
        """
        vm.irqfd(self.irq_fd, self.gsi)
        if ignored_ack_fd is not None:
            # With the used buffer bit kept, acknowledging it is a write with no effect.
            vm.ioeventfd(
                ignored_ack_fd, self.base + Register.INTERRUPT_ACK, 4,
                datamatch=InterruptBit.USED_BUFFER,
            )
        if self._has_ioeventfds:
            for queue, doorbell in enumerate(self.doorbells):
                vm.ioeventfd(doorbell, self.base + Register.QUEUE_NOTIFY, 4, datamatch=queue)

    def close(self) -> None:
        """Stop and close the device, free its eventfds; idempotent."""
        self._resources.close()


def eventfd(stack: contextlib.ExitStack) -> int:
    """Return an eventfd that does not block and is closed with ``stack``."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd
