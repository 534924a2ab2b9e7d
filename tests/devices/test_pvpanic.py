"""pvpanic as Linux's driver uses it: ask what is understood, then report."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.pvpanic import Event, PvPanic


class Rig:
    def __init__(self) -> None:
        self.panics = 0
        self.crashes = 0
        self.port = PvPanic(self._panic, self._crash)

    def _panic(self) -> None:
        self.panics += 1

    def _crash(self) -> None:
        self.crashes += 1


def test_both_events_are_offered() -> None:
    assert Rig().port.read(0, 1) == 0x03


def test_a_panic_and_a_loaded_crash_kernel_are_told_apart() -> None:
    rig = Rig()
    rig.port.write(0, 1, Event.CRASH_LOADED)
    assert (rig.panics, rig.crashes) == (0, 1)
    rig.port.write(0, 1, Event.PANICKED)
    assert (rig.panics, rig.crashes) == (1, 1)


def test_a_guest_that_repeats_itself_is_heard_once() -> None:
    rig = Rig()
    for _ in range(1000):
        rig.port.write(0, 1, Event.PANICKED | Event.CRASH_LOADED)
    assert (rig.panics, rig.crashes) == (1, 1)


def test_a_loaded_crash_kernel_needs_no_listener() -> None:
    seen: list[str] = []
    port = PvPanic(lambda: seen.append("panic"))
    port.write(0, 1, Event.CRASH_LOADED)
    assert seen == []


@given(value=st.integers(0, 0xFF))
def test_unknown_bits_are_ignored(value: int) -> None:
    rig = Rig()
    rig.port.write(0, 1, value)
    assert (rig.panics, rig.crashes) == (value & 1, value >> 1 & 1)
