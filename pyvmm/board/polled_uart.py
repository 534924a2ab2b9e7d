"""A UART whose driver's bytes come by the ringful, not by the exit.

A driver that polls, as Linux's does for the messages of its boot, makes two exits a character: it
reads LSR, then writes THR.  The write needs none: KVM gathers writes to a port in a ring, and since
the driver comes to read LSR before the next character, they are found there soon.

Soon is not always.  A driver may send and then not look at the UART again, and its bytes would
lie in the ring unseen.  So KVM is asked for this only while a driver is seen to look before it
sends; meanwhile the ring is looked at every TICK_S besides; and when the UART has not been used for
QUIET_TICKS of these, or its driver wants to be interrupted when it may send more, it is back to an
exit a write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.devices.serial import FIFO_SIZE, Register, Serial
from pyvmm.errors import KvmError
from pyvmm.kvm.exits import CoalescedRing

POLLED_BYTES = 64
"""So many bytes sent by a driver that looks at LSR for every FIFO_SIZE of them, and it polls."""
TICK_S = 0.02
QUIET_TICKS = 10


class PolledUart:
    """A BusDevice before ``uart``; only that if ``ring`` is None.

    ``gather`` has KVM gather what is written to the UART's first port, or no longer; KvmError if it
    cannot.  ``begin`` has ``tick`` called, from any thread, and again after as many seconds as
    that returns.
    """

    def __init__(
        self,
        uart: Serial,
        *,
        ring: CoalescedRing | None,
        gather: Callable[[bool], None],
        begin: Callable[[], None],
    ) -> None:
        self._uart = uart
        self._ring = ring
        self._gather = gather
        self._begin = begin
        # Held from taking bytes out of the ring until the UART has them: a vCPU's thread and the
        # ticks' take them, and none may overtake the other.
        self._lock = threading.Lock()
        self._gathers = False
        self._can_gather = ring is not None
        self._is_watched = False
        self._may_send = 0  # bytes, after a look at LSR
        self._polled = 0  # bytes sent by polling
        self._quiet_ticks = 0

    def read(self, offset: int, size: int) -> int:
        """BusDevice: read registers."""
        if self._gathers:
            self.flush()
        if offset == Register.LSR:
            self._may_send = FIFO_SIZE
        return self._uart.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice: write registers."""
        if self._gathers:
            # Gathered bytes come first, so also while a tick ends the gathering.
            with self._lock:
                self._take()
                self._uart.write(offset, size, value)
                self._quiet_ticks = 0
                if self._uart.interrupts_when_empty or self._is_watched:
                    self._stop()
            return
        if offset == Register.DATA:
            if self._may_send:
                self._may_send -= 1
                self._polled += 1
                if self._polled == POLLED_BYTES:
                    self._start()
            else:
                self._polled = 0
        self._uart.write(offset, size, value)

    def save(self) -> dict[str, object]:
        """Send what KVM has gathered, then return the UART's state.

        Nothing of this class is in it: how a driver polls is seen anew after POLLED_BYTES.
        """
        self.flush()
        return self._uart.save()

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        self._uart.restore(data)

    def drive_line(self) -> None:
        """See ``Serial.drive_line``."""
        self._uart.drive_line()

    def stop_gathering(self) -> None:
        """Have every write make an exit, for whoever wants to see them; any thread, does not wait.

        From now on, but while the UART is being used from the next tick on.  Its user may wait for
        room in a console that the caller empties.
        """
        self._is_watched = True
        if self._lock.acquire(blocking=False):
            try:
                if self._gathers:
                    self._stop()
            finally:
                self._lock.release()

    def flush(self) -> None:
        """Send what KVM has gathered."""
        with self._lock:
            self._take()
        self._quiet_ticks = 0

    def tick(self) -> float | None:
        """IoSource's service: see what KVM has gathered; when to come back, None if never."""
        with self._lock:
            if not self._gathers:
                return None
            if self._take():
                self._quiet_ticks = 0
            self._quiet_ticks += 1
            if self._quiet_ticks <= QUIET_TICKS and not self._is_watched:
                return TICK_S
            self._stop()
            return None

    def _start(self) -> None:
        with self._lock:
            self._polled = 0
            is_wanted = self._can_gather and not self._is_watched
            if is_wanted and not self._uart.interrupts_when_empty:
                self._quiet_ticks = 0
                self._ask(True)
                self._gathers = self._can_gather
        if self._gathers:
            self._begin()

    def _stop(self) -> None:
        """With the lock held."""
        self._ask(False)
        self._take()  # what came before KVM obeyed
        self._gathers = False

    def _ask(self, on: bool) -> None:
        try:
            self._gather(on)
        except KvmError:  # one exit a byte is what there was before
            self._can_gather = False

    def _take(self) -> bool:
        """Send what the ring holds; True if there was anything."""
        data = b"".join(data for _, data in self._ring.take()) if self._ring is not None else b""
        self._uart.send(data)
        return bool(data)
