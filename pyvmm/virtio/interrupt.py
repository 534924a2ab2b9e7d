"""How a virtio-mmio device interrupts: InterruptStatus, and the line behind it (4.2.2)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.virtio.spec import InterruptBit, Register

_USED_BUFFER = int(InterruptBit.USED_BUFFER)
_CONFIG_CHANGE = int(InterruptBit.CONFIG_CHANGE)
_INTERRUPT_STATUS = Register.INTERRUPT_STATUS // 4


class InterruptLine:
    """InterruptStatus in ``words``, the register page, and the line that ``raise_irq`` pulses.

    InterruptStatus does not change while a thread holds ``lock``.

    With ``keep_used`` the used buffer bit is set while the device runs, acknowledged or not.
    """

    def __init__(
        self, words: memoryview, raise_irq: Callable[[], None], *, keep_used: bool
    ) -> None:
        self._words = words
        self._raise_irq = raise_irq
        self._keep_used = keep_used
        self._is_running = False
        self._kept = 0
        self.lock = threading.Lock()

    def start(self) -> None:
        """Note that the device runs from here on."""
        with self.lock:
            self._start()

    def _start(self) -> None:
        self._is_running = True
        if self._keep_used:
            self._words[_INTERRUPT_STATUS] |= _USED_BUFFER
            self._kept = _USED_BUFFER

    def reset(self) -> None:
        """Note that the device runs no more; nothing is pending."""
        with self.lock:
            self._is_running = False
            self._kept = self._words[_INTERRUPT_STATUS] = 0

    def save(self) -> dict[str, object]:
        """Return InterruptStatus (docs/architecture.md, "State")."""
        with self.lock:
            return {"status": self._words[_INTERRUPT_STATUS], "running": self._is_running}

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError.  The line is not pulsed."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("interrupt line", data)
        status = fields.integer("status", 0, _USED_BUFFER | _CONFIG_CHANGE)
        running = fields.boolean("running")
        fields.end()
        with self.lock:
            self._kept = 0
            self._is_running = False
            self._words[_INTERRUPT_STATUS] = status
            if running:
                self._start()

    @property
    def is_running(self) -> bool:
        """True from ``start`` to ``reset``."""
        return self._is_running

    def notify_used(self, queue_index: int) -> None:
        """Send a used buffer notification; virtio-mmio has one line for all queues."""
        if self._kept:
            self._raise_irq()
        else:
            self._set(_USED_BUFFER)

    def notify_config(self) -> None:
        """Send a configuration change notification."""
        self._set(_CONFIG_CHANGE)

    def _set(self, bit: int) -> None:
        with self.lock:
            self._words[_INTERRUPT_STATUS] |= bit
        self._raise_irq()

    def acknowledge(self, bits: int) -> None:
        """Clear ``bits`` of InterruptStatus."""
        with self.lock:
            self._words[_INTERRUPT_STATUS] &= ~bits | self._kept
