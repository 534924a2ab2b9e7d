"""Power-off and reset, as ACPI's hardware-reduced platforms have them (ACPI 6.5).

4.8.3.7 Sleep Control and Status Registers, 4.8.3.6 Reset Register: one port each, which the guest
finds in the FADT.  Linux powers off by clearing the wake status and then writing S5 to the sleep
control register.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.byte_device import ByteDevice
from pyvmm.startup.types import IntEnum


class Register(IntEnum):
    """Offsets."""

    SLEEP_CONTROL = 0
    SLEEP_STATUS = 1
    RESET = 2


SLEEP_TYPE_SHIFT, SLEEP_TYPE_MASK = 2, 0x7
SLEEP_ENABLE = 1 << 5


class Power(ByteDevice):
    """The three registers.

    ``s5_sleep_type`` is the first element of ``\\_S5``: the sleep type that means soft off.
    ``reset_value`` is the FADT's: writing it resets.  No other state can be entered, so nothing
    ever wakes and the status register reads 0.
    """

    LENGTH = 3

    def __init__(
        self,
        *,
        s5_sleep_type: int,
        reset_value: int,
        on_power_off: Callable[[], None],
        on_reset: Callable[[], None],
    ) -> None:
        self._s5_sleep_type = s5_sleep_type
        self._reset_value = reset_value
        self._on_power_off = on_power_off
        self._on_reset = on_reset
        self._sleep_type = 0

    def save(self) -> dict[str, object]:
        """Return the registers' state."""
        return {"sleep_type": self._sleep_type}

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("power", data)
        sleep_type = fields.integer("sleep_type", 0, SLEEP_TYPE_MASK)
        fields.end()
        self._sleep_type = sleep_type

    def read_byte(self, offset: int) -> int:
        """The sleep type last written; SLP_EN is write-only and the status is always clear."""
        return self._sleep_type << SLEEP_TYPE_SHIFT if offset == Register.SLEEP_CONTROL else 0

    def write_byte(self, offset: int, value: int) -> None:
        """Power off or reset, if ``value`` is the one that does."""
        if offset == Register.SLEEP_CONTROL:
            sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK
            self._sleep_type = sleep_type
            if value & SLEEP_ENABLE and sleep_type == self._s5_sleep_type:
                self._on_power_off()
        elif offset == Register.RESET and value == self._reset_value:
            self._on_reset()
