"""Power-off and reset by ACPI's registers, with the values that the tables give the guest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.board.bus import Bus
from pyvmm.devices.power import Power, Register
from pyvmm.x86 import layout
from pyvmm.x86.layout import RESET_VALUE, S5_SLEEP_TYPE

SLP_EN = 0x20
S5 = S5_SLEEP_TYPE << 2 | SLP_EN


class Rig:
    """The device where the tables say it is."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.pio = Bus("PIO", 0)
        power = Power(
            s5_sleep_type=S5_SLEEP_TYPE, reset_value=RESET_VALUE,
            on_power_off=lambda: self.seen.append("off"),
            on_reset=lambda: self.seen.append("reset"),
        )
        self.pio.add(layout.SLEEP_CONTROL_PORT, Power.LENGTH, power)


def test_the_registers_are_where_the_tables_say() -> None:
    ports = [layout.SLEEP_CONTROL_PORT + register for register in Register]
    assert ports == [layout.SLEEP_CONTROL_PORT, layout.SLEEP_STATUS_PORT, layout.RESET_PORT]
    assert len(ports) == Power.LENGTH


def test_linux_powers_off() -> None:
    rig = Rig()
    rig.pio.write(layout.SLEEP_STATUS_PORT, 1, 0x80)  # acpi_hw_extended_sleep clears WAK_STS
    assert rig.pio.read(layout.SLEEP_STATUS_PORT, 1) == 0
    assert rig.seen == []
    rig.pio.write(layout.SLEEP_CONTROL_PORT, 1, S5)
    assert rig.seen == ["off"]


def test_linux_resets() -> None:
    rig = Rig()
    rig.pio.write(layout.RESET_PORT, 1, RESET_VALUE)
    assert rig.seen == ["reset"]


def test_the_sleep_type_alone_does_nothing_and_reads_back_without_slp_en() -> None:
    rig = Rig()
    rig.pio.write(layout.SLEEP_CONTROL_PORT, 1, S5 & ~SLP_EN)
    assert rig.seen == []
    rig.pio.write(layout.SLEEP_CONTROL_PORT, 1, 3 << 2 | SLP_EN)
    assert rig.seen == [], "there is no S3"
    assert rig.pio.read(layout.SLEEP_CONTROL_PORT, 1) == 3 << 2


@pytest.mark.parametrize("register", list(Register))
@given(value=st.integers(0, 0xFF))
def test_nothing_else_ends_the_run(register: Register, value: int) -> None:
    rig = Rig()
    rig.pio.write(layout.SLEEP_CONTROL_PORT + register, 1, value)
    off = register is Register.SLEEP_CONTROL and value & 0x3C == S5
    reset = register is Register.RESET and value == RESET_VALUE
    assert rig.seen == (["off"] if off else ["reset"] if reset else [])
    assert rig.pio.read(layout.SLEEP_STATUS_PORT, 1) == 0
    assert rig.pio.read(layout.RESET_PORT, 1) == 0
