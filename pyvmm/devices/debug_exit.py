"""The debug-exit port: the byte a guest writes there ends the run and becomes its status."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.byte_device import ByteDevice


class DebugExit(ByteDevice):
    """A write-only register.  ``on_exit`` gets the low byte written to it, 0-255.

    It has four ports so that a 16- or 32-bit OUT reaches it too.
    """

    LENGTH = 4

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def save(self) -> dict[str, object]:
        """Return an empty state.  The port has no state."""
        return {}

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        from pyvmm.state import Fields  # not on the boot path

        Fields("debug exit port", data).end()

    def read_byte(self, offset: int) -> int:
        """Write-only: reads as an unmapped port does."""
        return 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        """End the run with ``value``."""
        if offset == 0:
            self._on_exit(value)
