"""save() and restore() of every chip: the copy answers as the original would; junk is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices import serial as uart
from pyvmm.devices.boot_timer import BootTimer
from pyvmm.devices.debug_exit import DebugExit
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.pci_host import PciHost
from pyvmm.devices.power import Power
from pyvmm.devices.pvpanic import Event, PvPanic
from pyvmm.devices.rtc import HOLD_NS, Rtc
from pyvmm.devices.serial import Serial
from pyvmm.errors import StateError
from tests.support.states import Part, is_plain, spoilt


class Board:
    """One chip, the ports at which a guest reaches it, and what it told the host."""

    def __init__(self, part: Part, ports: list[tuple[Any, int]], host: list[object]) -> None:
        self.part = part
        self.ports = ports
        self.host = host

    def do(self, accesses: list[tuple[bool, int, int]]) -> list[int]:
        """Make the accesses; the values read."""
        read = []
        for is_write, where, value in accesses:
            device, offset = self.ports[where % len(self.ports)]
            if is_write:
                device.write(offset, 1, value)
            else:
                read.append(device.read(offset, 1))
        return read


def _serial() -> Board:
    host: list[object] = []
    part = Serial(host.append, host.append, lambda: host.append("room"))
    return Board(part, [(part, offset) for offset in range(Serial.LENGTH)], host)


def _i8042() -> Board:
    host: list[object] = []
    part = I8042(lambda: host.append("reset"))
    return Board(part, [(part.data_port, 0), (part.command_port, 0)], host)


def _rtc() -> Board:
    now_ns = 1_800_000_000_000_000_000
    part = Rtc(lambda: now_ns)
    return Board(part, [(part, 0), (part, 1)], [])


def _power() -> Board:
    host: list[object] = []
    part = Power(s5_sleep_type=5, reset_value=1, on_power_off=lambda: host.append("off"),
                 on_reset=lambda: host.append("reset"))
    return Board(part, [(part, offset) for offset in range(Power.LENGTH)], host)


def _pvpanic() -> Board:
    host: list[object] = []
    part = PvPanic(lambda: host.append("panic"), lambda: host.append("crash kernel"))
    return Board(part, [(part, 0)], host)


def _boot_timer() -> Board:
    part = BootTimer(lambda: 1.5)
    return Board(part, [(part, 0)], [])


def _debug_exit() -> Board:
    host: list[object] = []
    part = DebugExit(host.append)
    return Board(part, [(part, offset) for offset in range(DebugExit.LENGTH)], host)


BOARDS: dict[str, Callable[[], Board]] = {
    "serial": _serial, "i8042": _i8042, "rtc": _rtc, "power": _power, "pvpanic": _pvpanic,
    "boot_timer": _boot_timer, "debug_exit": _debug_exit,
}  # fmt: skip
VALUES = st.integers(0, 255) | st.sampled_from([0x0A, 0x0B, 0x32, 0x60, 0xD1, 0xD3, 0x80, 0x20])
ACCESSES = st.lists(st.tuples(st.booleans(), st.integers(0, 7), VALUES), max_size=40)


@pytest.mark.parametrize("make", BOARDS.values(), ids=BOARDS)
@given(before=ACCESSES, after=ACCESSES)
def test_a_restored_chip_goes_on_as_the_original_does(
    make: Callable[[], Board], before: list[tuple[bool, int, int]],
    after: list[tuple[bool, int, int]],
) -> None:
    original, copy = make(), make()
    original.do(before)
    state = original.part.save()
    assert is_plain(state), state
    copy.part.restore(state)
    assert copy.host == [], "the guest's and the host's side hear nothing of it"
    assert copy.part.save() == state
    del original.host[:]
    assert copy.do(after) == original.do(after)
    assert copy.host == original.host
    assert copy.part.save() == original.part.save()


@pytest.mark.parametrize("make", BOARDS.values(), ids=BOARDS)
@given(data=st.data(), before=ACCESSES, after=ACCESSES)
def test_junk_is_a_state_error_and_changes_nothing(
    make: Callable[[], Board], data: st.DataObject, before: list[tuple[bool, int, int]],
    after: list[tuple[bool, int, int]],
) -> None:
    board = make()
    board.do(before)
    state = board.part.save()
    fresh = make()
    unchanged = fresh.part.save()
    try:
        fresh.part.restore(data.draw(spoilt(state)))
    except StateError:
        assert fresh.part.save() == unchanged
    fresh.do(after)  # what it took is good enough to go on with


def test_the_message_names_part_field_and_limit() -> None:
    board = _serial()
    with pytest.raises(StateError, match=r"^serial: ier is not an integer of 0 to 15$"):
        board.part.restore(board.part.save() | {"ier": 16})
    with pytest.raises(StateError, match=r"^serial: fifo is not 0 to 16 bytes$"):
        board.part.restore(board.part.save() | {"fifo": bytes(17)})
    with pytest.raises(StateError, match=r"^serial: has no field 'x'$"):
        board.part.restore(board.part.save() | {"x": 1})


def test_received_bytes_and_the_ones_cleared_unread_come_along() -> None:
    board, copy = _serial(), _serial()
    board.ports[0][0].write(uart.Register.IER, 1, uart.IER_RX)
    assert board.ports[0][0].receive(b"typed") == 5
    copy.part.restore(board.part.save())
    assert copy.host == []
    copy.ports[0][0].drive_line()
    assert copy.host == [True], "the line was high, and KVM's new chip does not know"
    assert bytes(copy.ports[0][0].read(0, 1) for _ in range(5)) == b"typed"


def test_a_clock_that_was_set_keeps_its_distance_to_the_hosts() -> None:
    now_ns = [1_800_000_000_000_000_000]
    first, second = Rtc(lambda: now_ns[0]), Rtc(lambda: now_ns[0])
    for register, value in ((0x0B, 0x80), (9, 0x99), (0x0B, 0x02)):
        first.write(0, 1, register)
        first.write(1, 1, value)
    second.restore(first.save())
    now_ns[0] += 3600 * 10**9 + HOLD_NS
    for register in (0x32, 9, 8, 7, 4, 2, 0):
        for clock in (first, second):
            clock.write(0, 1, register)
        assert first.read(1, 1) == second.read(1, 1)


def test_a_panic_that_was_reported_is_not_reported_again() -> None:
    board, copy = _pvpanic(), _pvpanic()
    board.ports[0][0].write(0, 1, Event.PANICKED)
    copy.part.restore(board.part.save())
    copy.ports[0][0].write(0, 1, Event.PANICKED | Event.CRASH_LOADED)
    assert copy.host == ["crash kernel"]


@given(st.integers(0, 2**32 - 1))
def test_the_pci_bridge_keeps_the_address(address: int) -> None:
    bridge, copy = PciHost(), PciHost()
    bridge.write(0, 4, address)
    copy.restore(bridge.save())
    assert copy.read(0, 4) == bridge.read(0, 4)
    assert copy.read(4, 4) == bridge.read(4, 4)


@given(data=st.data(), address=st.integers(0, 2**32 - 1))
def test_the_pci_bridge_refuses_junk(data: st.DataObject, address: int) -> None:
    bridge = PciHost()
    bridge.write(0, 4, address)
    with contextlib.suppress(StateError):
        bridge.restore(data.draw(spoilt(bridge.save())))
    assert bridge.read(0, 4) & ~0x80FF_FFFC == 0
