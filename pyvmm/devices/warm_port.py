"""The warm port: a guest that writes 1 there is warm, and can be saved now.

Only a run that takes a snapshot has the port (``pyvmm run --snapshot``).  guest/exit/pyvmm-warm.c
writes to it for a shell script.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.byte_device import ByteDevice

WARM_NOW = 1
"""All other bytes are reserved and do nothing."""


class WarmPort(ByteDevice):
    """A write-only port; ``on_warm`` is called, by the vCPU that writes it, for each WARM_NOW.

    The port has no state and is not on the list of a machine's parts: the state of a machine with
    the port fits a machine without it, where the write goes nowhere.
    """

    LENGTH = 1

    def __init__(self, on_warm: Callable[[], None]) -> None:
        self._on_warm = on_warm

    def read_byte(self, offset: int) -> int:
        """Write-only: reads as an unmapped port does."""
        return 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        """Say that the guest is warm, if ``value`` does."""
        if value == WARM_NOW:
            self._on_warm()
