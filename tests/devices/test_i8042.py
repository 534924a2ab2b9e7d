"""The keyboard controller as Linux uses it: probed quickly, and the way to reset the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.i8042 import I8042, Command

OUTPUT_FULL = 0x01


class Rig:
    def __init__(self) -> None:
        self.resets = 0
        self.chip = I8042(self._reset)

    def _reset(self) -> None:
        self.resets += 1

    def command(self, value: int, data: int | None = None) -> None:
        self.chip.command_port.write(0, 1, value)
        if data is not None:
            self.chip.data_port.write(0, 1, data)

    def reply(self) -> int | None:
        if not self.chip.command_port.read(0, 1) & OUTPUT_FULL:
            return None
        return self.chip.data_port.read(0, 1)


@pytest.mark.parametrize(("command", "reply"), [
    (Command.SELF_TEST, 0x55), (Command.TEST_KEYBOARD, 0x00), (Command.READ_OUTPUT, 0x01),
])
def test_probing_is_answered_at_once(command: Command, reply: int) -> None:
    rig = Rig()
    rig.command(command)
    assert rig.reply() == reply
    assert rig.reply() is None


def test_there_is_no_mouse() -> None:
    rig = Rig()
    rig.command(Command.TEST_AUX)
    assert rig.reply() not in (0x00, 0xFA, 0xFF)


def test_the_control_byte_is_kept() -> None:
    rig = Rig()
    rig.command(Command.WRITE_CONTROL, 0x61)
    rig.command(Command.READ_CONTROL)
    assert rig.reply() == 0x61


def test_the_reset_command_resets() -> None:
    rig = Rig()
    rig.command(Command.RESET_CPU)
    assert rig.resets == 1


def test_clearing_the_output_ports_reset_line_resets() -> None:
    rig = Rig()
    rig.command(Command.WRITE_OUTPUT, 0xFF)
    assert rig.resets == 0
    rig.command(Command.WRITE_OUTPUT, 0xFE)
    assert rig.resets == 1


def test_data_without_a_command_goes_nowhere() -> None:
    rig = Rig()
    rig.chip.data_port.write(0, 1, 0xFE)
    assert rig.resets == 0
    assert rig.reply() is None


@given(writes=st.lists(st.tuples(st.booleans(), st.integers(0, 255)), max_size=50))
def test_any_bytes_are_survived(writes: list[tuple[bool, int]]) -> None:
    rig = Rig()
    for to_command, value in writes:
        (rig.chip.command_port if to_command else rig.chip.data_port).write(0, 1, value)
        assert 0 <= rig.chip.command_port.read(0, 1) <= 0xFF
    assert rig.chip.data_port.read(0, 4) >= 0
