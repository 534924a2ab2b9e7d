"""The virtio-mmio transport, version 2 (virtio 1.2, 4.2 "Virtio Over MMIO").

The registers are one 4 KiB page of memory that the transport owns.  Reads come from the page;
writes go to the transport, which updates the page before it returns, so that selecting a queue
changes what the page shows.  The page can therefore be served by trapping every access
(``read`` and ``write``) or be mapped into the guest read-only, where only writes arrive here.

Two locks: one for registers and queues, held for a whole pass over a queue, so that a reset waits
for the pass that is under way; and a small one for InterruptStatus, so that acknowledging an
interrupt never waits for a disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.errors import ActivateError, GuestError, RingError, StateError
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.interrupt import InterruptLine
from pyvmm.virtio.register_page import CONFIG, CONFIG_BYTES, RegisterPage
from pyvmm.virtio.ring.queue import Queue
from pyvmm.virtio.ring.rings import make_ring
from pyvmm.virtio.spec import Feature, Register, Status
from pyvmm.virtio.status import (
    FAILED,
    NEEDS_RESET,
    NEGOTIATED,
    RUNNING,
    STEPS,
    STOPPED,
    TRANSITIONS,
)

# Plain integers: to look a member of an enumeration up costs more than what is done with it.
_QUEUE_NOTIFY = int(Register.QUEUE_NOTIFY)
_WORD = 0xFFFF_FFFF
_REGISTER_SIZE = 4


class MmioTransport:
    """One virtio-mmio device: ``device`` behind a register page, ``page`` if that is given.

    ``raise_irq`` pulses the device's interrupt line; ``report`` tells the user a line.  ``defer``
    has an I/O thread call ``service`` for a queue with work that ``write`` left behind, which else
    waits for the next notification.  All run in the caller's thread.  A guest makes none raise.

    With ``keep_used`` InterruptStatus says from DRIVER_OK to reset that there are used buffers,
    because interrupts do not come from here, or acknowledgements do not arrive here.  A driver
    looks at its queues at every interrupt, and finds none or some.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        raise_irq: Callable[[], None],
        *,
        report: Callable[[str], None],
        defer: Callable[[int], None] | None = None,
        keep_used: bool = False,
        page: memoryview | None = None,
    ) -> None:
        self._page = RegisterPage(device.device_type, page)
        self.page = self._page.bytes
        self._device = device
        self._memory = memory
        self._report = report
        self._defer = defer
        self._lock = threading.Lock()
        self._queue_count = len(device.queues)
        self._reset_queues: set[int] = set()
        # True while the status register says that the device serves its queues.
        self._is_running = False
        self._words = self._page.words
        self._interrupt = InterruptLine(self._words, raise_irq, keep_used=keep_used)
        self._writers: dict[int, Callable[[int], None]] = {
            Register.DEVICE_FEATURES_SEL: self._select_device_features,
            Register.DRIVER_FEATURES_SEL: self._select_driver_features,
            Register.DRIVER_FEATURES: self._write_driver_features,
            Register.QUEUE_SEL: self._select_queue,
            Register.QUEUE_NUM: self._write_queue_num,
            Register.QUEUE_READY: self._write_queue_ready,
            Register.QUEUE_DESC_LOW: self._address_writer("descriptor_area", 0),
            Register.QUEUE_DESC_HIGH: self._address_writer("descriptor_area", 32),
            Register.QUEUE_DRIVER_LOW: self._address_writer("driver_area", 0),
            Register.QUEUE_DRIVER_HIGH: self._address_writer("driver_area", 32),
            Register.QUEUE_DEVICE_LOW: self._address_writer("device_area", 0),
            Register.QUEUE_DEVICE_HIGH: self._address_writer("device_area", 32),
            Register.QUEUE_RESET: self._write_queue_reset,
            Register.STATUS: self._write_status,
        }
        # Nobody reads it yet.
        self._page.set_space(device.read_config(0, CONFIG_BYTES), 0)
        self._reset()

    # The faces: the bus calls read and write, an I/O thread calls service.

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes of the page at ``offset``, little-endian; ones outside it."""
        if offset < 0 or offset + size > PAGE_SIZE:
            return (1 << 8 * size) - 1
        return int.from_bytes(self.page[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the ``size`` low bytes of ``value``, which the driver writes at ``offset``.

        "The driver MUST only use 32 bit wide and aligned reads and writes to access the control
        registers": other writes to them are ignored, and so are writes to what is read-only.
        A QueueNotify that arrives here gets its pass before the call returns.
        """
        if offset >= CONFIG:
            if offset + size <= PAGE_SIZE:
                self._write_config(offset - CONFIG, size, value)
            return
        if size != _REGISTER_SIZE:
            return
        value &= _WORD
        if offset == _QUEUE_NOTIFY:
            if self.service(value) is not None and self._defer:
                self._defer(value)
        elif offset == Register.INTERRUPT_ACK:
            self._interrupt.acknowledge(value)
        elif offset in self._writers:
            with self._lock:
                self._writers[offset](value)

    def service(self, queue_index: int) -> float | None:
        """Make one bounded pass over queue ``queue_index``, on the caller's thread; never sleep.

        Return the seconds after which to call again: 0.0 if more is waiting, more if a rate limit
        says so, None if the next notification is soon enough.  Notifications for a queue
        that does not exist or is not set up, or that come before DRIVER_OK, do nothing.
        """
        with self._lock:
            if not self._is_running or not 0 <= queue_index < self._queue_count:
                return None
            try:
                return self._device.process_queue(queue_index)
            except RingError as error:
                self._need_reset(f"queue {queue_index}: {error}")
                return None

    def config_changed(self) -> None:
        """Show the new contents of the device's configuration space, and tell the driver."""
        with self._lock:
            self._show_config()
            if self._status & Status.DRIVER_OK:
                self._interrupt.notify_config()

    def save(self) -> dict[str, object]:
        """Return the registers and the device's state (docs/architecture.md, "State")."""
        with self._lock:
            return {
                "status": self._status,
                "device_features_sel": self._device_features_sel,
                "driver_features_sel": self._driver_features_sel,
                "driver_features": self._driver_features,
                "queue_sel": self._queue_index,
                "reset_queues": sorted(self._reset_queues),
                "config_generation": self._page.generation,
                "interrupt": self._interrupt.save(),
                "device": self._device.save(),
            }

    def restore(self, data: object) -> None:
        """Take what ``save`` returned, in place of all that a driver did; StateError.

        If ``data`` is refused, the device is reset.  If it is accepted and the device is active,
        the caller must ``service`` each queue and pulse the line once: a doorbell or an interrupt
        that was on its way is in no state.
        """
        with self._lock:
            self._reset(shows_config=False)
            try:
                self._restore(data)
            except StateError:
                self._reset()
                raise

    def _restore(self, data: object) -> None:
        from pyvmm.state import Fields  # not on the boot path

        device = self._device
        fields = Fields(f"{device.name}, transport", data)
        status = fields.integer("status", 0, 0xFF)
        device_features_sel = fields.integer("device_features_sel", 0, _WORD)
        driver_features_sel = fields.integer("driver_features_sel", 0, _WORD)
        driver_features = fields.integer("driver_features", 0, (1 << 96) - 1)
        queue_index = fields.integer("queue_sel", 0, _WORD)
        generation = fields.integer("config_generation", 0, _WORD)
        resets, line = fields.take("reset_queues"), fields.take("interrupt")
        device_state = fields.take("device")
        fields.end()
        if status & ~STOPPED not in STEPS:
            raise fields.error("status", f"{status:#x} is none that a driver can reach")
        last = self._queue_count - 1
        if not isinstance(resets, list) or not all(
            type(index) is int and 0 <= index <= last for index in resets
        ):
            raise fields.error("reset_queues", f"is not a list of integers from 0 to {last}")
        self._interrupt.restore(line)
        device.restore(device_state, self._memory, self._interrupt)
        if bool(status & Status.FEATURES_OK) != bool(device.acked_features):
            raise fields.error("status", f"{status:#x} does not fit the features accepted")
        is_running = bool(status & Status.DRIVER_OK)
        if self._interrupt.is_running != is_running:
            raise fields.error("status", f"{status:#x} does not fit the interrupt line")
        if device.is_activated != is_running and (device.is_activated or not status & NEEDS_RESET):
            raise fields.error("status", f"{status:#x} does not fit an active device or none")
        if any(device.queues[index].ready for index in resets):
            raise fields.error("reset_queues", "has a queue that is ready")
        self._page.set_space(device.read_config(0, CONFIG_BYTES), generation)
        self._select_device_features(device_features_sel)
        self._driver_features_sel, self._driver_features = driver_features_sel, driver_features
        self._reset_queues = set(resets)
        self._select_queue(queue_index)
        self._show_status(status)

    def close(self) -> None:
        """Let the pass under way end, stop the device and free the page; idempotent.

        The device's backend stays open: it belongs to whoever made it.
        """
        with self._lock:
            if self._page.is_closed:
                return
            self._device.reset()
            self._is_running = False
            self._page.close()

    # Status

    @property
    def _status(self) -> int:
        return self._words[Register.STATUS // 4]

    def _show_status(self, status: int) -> None:
        self._show(Register.STATUS, status)
        self._is_running = status & (RUNNING | STOPPED) == RUNNING

    def _write_status(self, value: int) -> None:
        status = self._status
        if value == 0:
            self._reset()
            return
        value &= ~NEEDS_RESET  # the device's bit; drivers write back what they read
        if value == status & ~NEEDS_RESET | FAILED:
            self._show_status(status | FAILED)
        elif (status, value) in TRANSITIONS:
            if value == NEGOTIATED and not self._negotiate():
                return
            self._show_status(value)
            if value == RUNNING:
                self._activate()

    def _negotiate(self) -> bool:
        """True if the device accepts the features that the driver wrote into DriverFeatures."""
        try:
            self._device.set_acked_features(self._driver_features)
        except GuestError as error:
            self._report(f"{self._device.name}: FEATURES_OK refused: {error}")
            return False
        self._show_config()  # what a field says may depend on the features
        return True

    def _activate(self) -> None:
        try:
            # First the bit, for the first interrupt may come while the device starts.
            self._interrupt.start()
            self._device.activate(self._memory, self._interrupt)
        except ActivateError as error:
            self._need_reset(str(error))

    def _need_reset(self, reason: str) -> None:
        """Stop until the driver resets: "the device MUST send a device configuration change
        notification" (2.1.2 "Device Requirements: Device Status Field")."""
        self._show_status(self._status | NEEDS_RESET)
        self._interrupt.notify_config()
        self._report(f"{self._device.name}: stopped until the guest resets it: {reason}")

    def _reset(self, *, shows_config: bool = True) -> None:
        """Reset the device (2.4 "Device Reset").  The lock is held, so no pass is under way."""
        self._device.reset()
        if shows_config:
            self._show_config()
        self._driver_features = 0
        self._driver_features_sel = 0
        self._queue_index = 0
        self._queue: Queue | None = None
        self._reset_queues.clear()
        self._select_device_features(0)
        self._select_queue(0)
        self._interrupt.reset()
        self._show_status(0)

    # Features

    def _select_device_features(self, word: int) -> None:
        self._device_features_sel = word
        features = self._device.avail_features >> 32 * word if word < 2 else 0
        self._show(Register.DEVICE_FEATURES, features & _WORD)

    def _select_driver_features(self, word: int) -> None:
        self._driver_features_sel = word

    def _write_driver_features(self, value: int) -> None:
        """Take 32 of the driver's feature bits, until FEATURES_OK is set (3.1.1 step 5)."""
        word = min(self._driver_features_sel, 2)  # bits from 64 on are none that were offered
        if not self._status & Status.FEATURES_OK:
            shift = 32 * word
            self._driver_features = self._driver_features & ~(_WORD << shift) | value << shift

    # Queues

    def _select_queue(self, index: int) -> None:
        queues = self._device.queues
        self._queue_index = index
        self._queue = queues[index] if index < len(queues) else None
        self._show(Register.QUEUE_NUM_MAX, self._queue.max_size if self._queue else 0)
        self._show(Register.QUEUE_READY, bool(self._queue and self._queue.ready))

    @property
    def _open_queue(self) -> Queue | None:
        """Return the selected queue if its registers may be written: "When QueueReady is not zero,
        the driver MUST NOT access" them, and after DRIVER_OK the set-up is over, except for a
        queue that was reset (2.6.1.2 "Virtqueue Re-enable")."""
        queue = self._queue
        if queue is None or queue.ready or self._status & STOPPED:
            return None
        if self._status & Status.DRIVER_OK and self._queue_index not in self._reset_queues:
            return None
        return queue

    def _write_queue_num(self, value: int) -> None:
        if queue := self._open_queue:
            queue.size = value

    def _address_writer(self, area: str, shift: int) -> Callable[[int], None]:
        """Return a writer of 32 bits, from bit ``shift``, of the queue address ``area``."""

        def write(value: int) -> None:
            if queue := self._open_queue:
                address = getattr(queue, area) or 0
                setattr(queue, area, address & ~(_WORD << shift) | value << shift)

        return write

    def _write_queue_ready(self, value: int) -> None:
        """Hand the queue to the device, which checks it, on 1; stop it on 0.

        The lock is held, so nothing of a stopped queue is touched afterwards."""
        if value == 0 and self._queue:
            self._device.stop_queue(self._queue_index)
            self._show(Register.QUEUE_READY, 0)
        elif value == 1 and (queue := self._open_queue):
            try:
                if self._status & Status.DRIVER_OK:
                    self._device.start_queue(self._queue_index)
                else:
                    device = self._device
                    make_ring(queue, self._memory, device.acked_features, device.queues)
            except RingError as error:
                self._need_reset(f"queue {self._queue_index}: {error}")
                return
            queue.ready = True
            self._reset_queues.discard(self._queue_index)
            self._show(Register.QUEUE_READY, 1)

    def _write_queue_reset(self, value: int) -> None:
        """Reset the selected queue alone, on 1 (2.6.1.1 "Virtqueue Reset").

        The lock is held, so the reset is over before the driver can look: "The device MUST
        present 0 in both QueueReset and QueueReady when queue reset has completed", and nothing
        of the queue is touched afterwards.
        """
        if value != 1 or self._queue is None:
            return
        if self._device.acked_features & Feature.RING_RESET:
            self._device.reset_queue(self._queue_index)
            self._reset_queues.add(self._queue_index)
            self._show(Register.QUEUE_READY, 0)

    # Configuration space and the page

    def _write_config(self, offset: int, size: int, value: int) -> None:
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        with self._lock:
            self._device.write_config(offset, data)
            self._show_config()

    def _show_config(self) -> None:
        """Show the configuration space as it is now, with a new generation if it has changed."""
        space = self._device.read_config(0, CONFIG_BYTES)
        self._page.change_space(space, self._interrupt.lock)

    def _show(self, register: Register, value: int) -> None:
        self._words[register // 4] = value
