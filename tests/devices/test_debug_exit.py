"""The debug-exit port: one byte, the guest's status."""

from __future__ import annotations

from pyvmm.devices.debug_exit import DebugExit


def test_the_byte_written_is_the_status() -> None:
    seen: list[int] = []
    port = DebugExit(seen.append)
    port.write(0, 1, 7)
    assert seen == [7]
    assert port.read(0, 1) == 0xFF


def test_of_a_wide_write_the_low_byte_counts() -> None:
    seen: list[int] = []
    DebugExit(seen.append).write(0, 4, 0x11223307)
    assert seen == [7]
