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
import time
from collections.abc import Callable
from typing import TypeVar

from pyvmm.bus import Bus
from pyvmm.io_loop import IoSource
from pyvmm.kvm.handles import Vm
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import InterruptBit, Register
from pyvmm.x86 import layout

_Result = TypeVar("_Result")
FIRST_PAGE_SLOT = 8
"""KVM memory slots below it are RAM, those from it on register pages."""

SLOW_WAIT_S = 100e-6
"""A pass that waits for its disk longer than this, on average, does not belong on a vCPU: the
guest could have computed meanwhile.  It is about what waking the disk's thread costs."""
FAST_WAIT_S = SLOW_WAIT_S / 4
DWELL_S = 1.0
"""How long a place is kept at least."""
SAMPLE = 16
"""Of so many passes one is measured: the thread's CPU clock is a system call."""
_WEIGHT = 1 / 8  # of the newest measurement in the average


class Slot:
    """Slot ``index``: ``device`` behind a register page at ``layout.virtio_slot(index)``.

    ``irq_fd`` and ``doorbells`` (one for each queue) are eventfds of the caller's; ``swallow`` is
    one that nobody reads, and asks for a mapped page, None for a trapped one.
    ``at_exit`` says where notifications are served, None to let it follow the disk's waits.
    ``sources`` is what a thread has to wait for; ``watch`` takes the place of the doorbells for a
    device whose queues another process serves.
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
        at_exit: bool | None,
        report: Callable[[str], None],
        watch: IoSource | None = None,
    ) -> None:
        self.device = device
        self._vm = vm
        self._doorbells = doorbells
        self._base, gsi = layout.virtio_slot(index)
        self.transport = MmioTransport(
            device, memory, functools.partial(os.eventfd_write, irq_fd, 1),
            report=lambda line: report(f"virtio{index}: {line}"),
            # What a notification served at the exit leaves undone goes to the thread.
            defer=lambda queue: os.eventfd_write(doorbells[queue], 1),
            keep_used=swallow is not None or watch is not None,
        )
        vm.irqfd(irq_fd, gsi)
        if swallow is not None:
            page = self.transport.page
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            vm.set_user_memory_region(
                FIRST_PAGE_SLOT + index, self._base, PAGE_SIZE, address, read_only=True
            )
            # With the used buffer bit kept, acknowledging it is a write with no effect.
            vm.ioeventfd(
                swallow, self._base + Register.INTERRUPT_ACK, 4,
                datamatch=InterruptBit.USED_BUFFER,
            )
        mmio.add(self._base, layout.VIRTIO_MMIO_STRIDE, self)
        self._passes = 0
        self._average_s = 0.0
        self._settled_until_s = 0.0
        self._adapts = at_exit is None and watch is None
        self.is_at_exit = watch is None and at_exit is not False
        if not self.is_at_exit:
            self._set_ioeventfds(assigned=True)
        self.sources = [watch] if watch is not None else [
            IoSource(doorbell, functools.partial(self._serve, queue))
            for queue, doorbell in enumerate(doorbells)
        ]

    def read(self, offset: int, size: int) -> int:
        """BusDevice: a register read that left the guest."""
        return self.transport.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice: a register write; a QueueNotify is served before it returns."""
        if offset == Register.QUEUE_NOTIFY and self._adapts and self._is_sample():
            self._measure(functools.partial(self.transport.write, offset, size, value))
        else:
            self.transport.write(offset, size, value)

    def _serve(self, queue: int) -> float | None:
        """A pass on the disk's thread."""
        if self._adapts and self._is_sample():
            return self._measure(functools.partial(self.transport.service, queue))
        return self.transport.service(queue)

    def _is_sample(self) -> bool:
        self._passes += 1
        return self._passes % SAMPLE == 0

    def _measure(self, do_pass: Callable[[], _Result]) -> _Result:
        """Do a pass, and move to the other place if the average wait says so.

        It may run on two threads at a time; then a pass is not counted, or counted twice.
        """
        clock_s, cpu_s = time.monotonic(), time.thread_time()
        result = do_pass()
        now_s = time.monotonic()
        wait_s = now_s - clock_s - (time.thread_time() - cpu_s)
        average_s = self._average_s = self._average_s + (wait_s - self._average_s) * _WEIGHT
        belongs_at_exit = average_s < (SLOW_WAIT_S if self.is_at_exit else FAST_WAIT_S)
        if belongs_at_exit != self.is_at_exit and now_s >= self._settled_until_s:
            self._settled_until_s = now_s + DWELL_S
            self.is_at_exit = belongs_at_exit
            self._set_ioeventfds(assigned=not belongs_at_exit)
        return result

    def _set_ioeventfds(self, *, assigned: bool) -> None:
        for queue, doorbell in enumerate(self._doorbells):
            self._vm.ioeventfd(
                doorbell, self._base + Register.QUEUE_NOTIFY, 4,
                datamatch=queue, deassign=not assigned,
            )

    def close(self) -> None:
        """Stop the device and free its page; idempotent."""
        self.transport.close()


def eventfd(stack: contextlib.ExitStack) -> int:
    """An eventfd that does not block and is closed with ``stack``."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd
