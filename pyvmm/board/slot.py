"""A virtio-mmio slot of the machine: a device, its register page, doorbells and interrupt.

Two things are decided here.  How the guest sees the register page: *mapped*, as read-only memory,
so that reading registers never leaves the guest and of the writes only those of set-up do; or
*trapped*, where every access is an exit.  And where a notification is served: *at the exit*, by
the vCPU that wrote it, or by the disk's *thread*, behind an ioeventfd (docs/performance.md has
the figures that make the rule).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable

from pyvmm.board.bus import Bus
from pyvmm.kvm.handles import Vm
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.run.io_loop import IoSource
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import InterruptBit, Register
from pyvmm.x86 import layout

FIRST_PAGE_SLOT = 8
"""KVM memory slots below it are RAM, those from it on register pages."""


class Slot:
    """Slot ``index``: ``device`` behind a register page at ``layout.virtio_slot(index)``.

    ``irq_fd`` and ``doorbells`` (one for each queue) are eventfds of the caller's; ``swallow`` is
    one that nobody reads, and asks for a mapped page, None for a trapped one.
    ``at_exit`` says where notifications are served.
    ``sources`` is what a thread has to wait for; ``watch`` takes the place of the doorbells for a
    device whose queues another process serves.

    Made before KVM's interrupt chips, because of its memory (``machine.build`` says why), and
    connected once they exist.
    """

    def __init__(
        self,
        index: int,
        device: VirtioDevice,
        *,
        memory: GuestMemory,
        vm: Vm,
        mmio: Bus,
        irq_fd: int,
        doorbells: tuple[int, ...],
        swallow: int | None,
        at_exit: bool,
        report: Callable[[str], None],
        watch: IoSource | None = None,
    ) -> None:
        self.device = device
        self._vm = vm
        self._irq_fd = irq_fd
        self._doorbells = () if at_exit else doorbells
        self._swallow = swallow
        base, _ = self._place = layout.virtio_slot(index)
        self.transport = MmioTransport(
            device, memory, functools.partial(os.eventfd_write, irq_fd, 1),
            report=lambda line: report(f"virtio{index}: {line}"),
            # What a notification served at the exit leaves undone goes to the thread.
            defer=lambda queue: os.eventfd_write(doorbells[queue], 1),
            keep_used=swallow is not None or watch is not None,
        )
        if swallow is not None:
            page = self.transport.page
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            vm.set_user_memory_region(
                FIRST_PAGE_SLOT + index, base, PAGE_SIZE, address, read_only=True
            )
        mmio.add(base, layout.VIRTIO_MMIO_STRIDE, self.transport)
        self.sources = [watch] if watch is not None else [
            IoSource(doorbell, functools.partial(self.transport.service, queue))
            for queue, doorbell in enumerate(doorbells)
        ]

    def connect(self) -> None:
        """Have KVM take interrupts from our eventfds, and notifications to them; once."""
        base, gsi = self._place
        self._vm.irqfd(self._irq_fd, gsi)
        if self._swallow is not None:
            # With the used buffer bit kept, acknowledging it is a write with no effect.
            self._vm.ioeventfd(
                self._swallow, base + Register.INTERRUPT_ACK, 4,
                datamatch=InterruptBit.USED_BUFFER,
            )
        for queue, doorbell in enumerate(self._doorbells):
            self._vm.ioeventfd(doorbell, base + Register.QUEUE_NOTIFY, 4, datamatch=queue)

    def close(self) -> None:
        """Stop the device and free its page; idempotent."""
        self.transport.close()


def eventfd(stack: contextlib.ExitStack) -> int:
    """An eventfd that does not block and is closed with ``stack``."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd
