"""The virtio console of a machine, and how it shares one terminal with the serial port.

One terminal shows one console: of two logins on it only one would hear what is typed.  The console
that gets the input is chosen (``RunConfig.console_is_virtio``).  If that is the virtio console, the
serial port is shown until the driver of the other has something to say: it has what
``earlyprintk=ttyS0`` says, for Linux's hvc driver does not repeat what was said before it came.
If it is the serial port, the virtio console is shown only if that stays silent, because the kernel
has no driver for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.virtio.console.device import ConsoleDevice

SILENCE_S = 5.0
"""Silent for so long after the virtio console's first word, the serial port stays silent."""
MAX_HELD_BYTES = 64 << 10


class Hvc0:
    """``device``, and when what it says is shown.

    ``show`` shows bytes on the terminal, of ``terminal_size``; ``on_room`` is called when there is
    room for typed bytes again.
    """

    def __init__(
        self,
        show: Callable[[bytes], None],
        on_room: Callable[[], None],
        *,
        terminal_size: Callable[[], tuple[int, int]],
        is_chosen: bool,
    ) -> None:
        self._show = show
        self._is_chosen = is_chosen
        self._is_shown = False
        self._serial_is_silent = True
        self._held = bytearray()  # of a device that is not chosen
        self._held_since_s = 0.0
        self.device = ConsoleDevice(
            self._show_own, on_room, size=terminal_size, on_reset=self._hide
        )

    def show_serial(self, data: bytes) -> None:
        """Show what the serial port sends, unless the virtio console is shown in its place."""
        self._serial_is_silent = False
        if not self._is_chosen or not self._is_shown:
            self._show(data)

    def save(self) -> dict[str, object]:
        """Return what is shown, and what is held back (docs/architecture.md, "State")."""
        return {
            "is_shown": self._is_shown, "serial_is_silent": self._serial_is_silent,
            "held": bytes(self._held),
        }

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError.  Held bytes wait for SILENCE_S anew."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("hvc0", data)
        is_shown, serial_is_silent = fields.boolean("is_shown"), fields.boolean("serial_is_silent")
        held = fields.octets("held", 0, MAX_HELD_BYTES)
        fields.end()
        self._is_shown, self._serial_is_silent = is_shown, serial_is_silent
        self._held, self._held_since_s = bytearray(held), time.monotonic()

    def finish(self) -> None:
        """The guest has ended: show what was held back, if there is nothing else."""
        if self._serial_is_silent and not self._is_chosen:
            self._is_shown = True
            held, self._held = self._held, bytearray()
            self._show(bytes(held))

    def _show_own(self, data: bytes) -> None:
        if self._is_chosen:
            self._is_shown = True
            self._show(data)
        elif self._serial_is_silent:
            self._hold(data)

    def _hold(self, data: bytes) -> None:
        """Keep ``data`` until it is clear that the serial port stays silent."""
        if self._is_shown:
            self._show(data)
            return
        now_s = time.monotonic()
        if not self._held:
            self._held_since_s = now_s
        self._held += data
        del self._held[:-MAX_HELD_BYTES]
        if now_s > self._held_since_s + SILENCE_S:
            self.finish()

    def _hide(self) -> None:
        """Its driver is gone: what comes next, a crash kernel, may only have the serial port."""
        self._is_shown = False
