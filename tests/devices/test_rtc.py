"""The MC146818 as drivers read and set it."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.rtc import HOLD_NS, Register, Rtc

SECOND = 1_000_000_000
MILLISECOND = 1_000_000
UIP, SET = 0x80, 0x80
EPOCH = datetime.datetime(1970, 1, 1)
TIME = (
    Register.CENTURY, Register.YEAR, Register.MONTH, Register.DAY, Register.HOURS,
    Register.MINUTES, Register.SECONDS,
)  # fmt: skip


def bcd(value: int) -> int:
    return int(str(value), 16)


class Rig:
    """A clock and the host's, which ``per_read_ns`` makes go on with every register read."""

    def __init__(self, now: datetime.datetime, *, per_read_ns: int = 0) -> None:
        self.now_ns = (now - EPOCH) // datetime.timedelta(microseconds=1) * 1000
        self.per_read_ns = per_read_ns
        self.chip = Rtc(lambda: self.now_ns)

    def read(self, register: int) -> int:
        self.now_ns += self.per_read_ns
        self.chip.write(0, 1, register)
        return self.chip.read(1, 1)

    def write(self, register: int, value: int) -> None:
        self.chip.write(0, 1, register)
        self.chip.write(1, 1, value)

    def fields(self) -> list[int]:
        """Century, year, month, day, hour, minute, second."""
        return [int(f"{self.read(register):x}") for register in TIME]

    def date(self) -> datetime.datetime:
        """What a driver that waits for UIP to be clear reads."""
        while self.read(Register.STATUS_A) & UIP:
            self.now_ns += MILLISECOND
        century, year, month, day, hour, minute, second = self.fields()
        return datetime.datetime(century * 100 + year, month, day, hour, minute, second)

    def set(self, values: list[int]) -> None:
        """Set raw registers, in the order of TIME, as Linux does: with SET and the divider off."""
        control, divider = self.read(Register.STATUS_B), self.read(Register.STATUS_A)
        self.write(Register.STATUS_B, control | SET)
        self.write(Register.STATUS_A, divider | 0x70)
        for register, value in zip(TIME, values, strict=True):
            self.write(register, value)
        self.write(Register.STATUS_B, control)
        self.write(Register.STATUS_A, divider)


def test_it_tells_the_hosts_utc_in_bcd_and_24_hours() -> None:
    rig = Rig(datetime.datetime(2024, 2, 29, 23, 59, 58))
    registers = [rig.read(register) for register in TIME]
    assert registers == [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58]
    assert rig.read(Register.WEEKDAY) == 5, "a Thursday; Sunday is 1"
    assert rig.read(Register.STATUS_A) == 0x26
    assert rig.read(Register.STATUS_B) == 0x02
    assert rig.read(Register.STATUS_C) == 0x00
    assert rig.read(Register.STATUS_D) == 0x80


@given(now=st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(9999, 12, 31)))
def test_every_date_is_told_right(now: datetime.datetime) -> None:
    rig = Rig(now.replace(microsecond=0))
    assert rig.date() == now.replace(microsecond=0)
    assert rig.read(Register.WEEKDAY) == now.isoweekday() % 7 + 1


def test_it_goes_on() -> None:
    rig = Rig(datetime.datetime(1999, 12, 31, 23, 59, 59))
    assert rig.date() == datetime.datetime(1999, 12, 31, 23, 59, 59)
    rig.now_ns += SECOND
    assert rig.date() == datetime.datetime(2000, 1, 1)


@given(before_us=st.integers(0, 20_000), per_read_us=st.integers(0, 2_000))
def test_a_slow_reader_never_sees_half_an_update(before_us: int, per_read_us: int) -> None:
    midnight = datetime.datetime(2025, 1, 1)
    rig = Rig(midnight - datetime.timedelta(microseconds=before_us),
              per_read_ns=per_read_us * 1000)
    assert rig.date() in (midnight - datetime.timedelta(seconds=1), midnight)


@given(before_us=st.integers(0, 20_000), per_read_us=st.integers(0, 2_000))
def test_nor_does_one_that_does_not_look_at_uip(before_us: int, per_read_us: int) -> None:
    midnight = datetime.datetime(2025, 1, 1)
    rig = Rig(midnight - datetime.timedelta(microseconds=before_us),
              per_read_ns=per_read_us * 1000)
    assert rig.fields() in ([20, 24, 12, 31, 23, 59, 59], [20, 25, 1, 1, 0, 0, 0])


def test_uip_announces_the_update() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.now_ns += SECOND - 245_000
    assert not rig.read(Register.STATUS_A) & UIP
    rig.now_ns += 2_000
    assert rig.read(Register.STATUS_A) & UIP
    rig.now_ns += 243_000
    assert not rig.read(Register.STATUS_A) & UIP
    assert rig.read(Register.SECONDS) == 1


def test_a_reader_of_status_a_sees_every_second_at_once() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.now_ns += SECOND - HOLD_NS // 2
    assert rig.date().second == 0
    rig.now_ns += HOLD_NS // 2
    assert rig.read(Register.SECONDS) == 0, "held"
    assert rig.date().second == 1


def test_registers_are_not_held_for_ever() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    assert rig.read(Register.SECONDS) == 0
    rig.now_ns += SECOND
    assert rig.read(Register.SECONDS) == 1
    rig.now_ns -= 10 * SECOND  # the host's clock was set back
    assert rig.read(Register.SECONDS) == 0x51


def test_setting_it_moves_it_and_the_next_second_comes_after_half_of_one() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.set([bcd(value) for value in (20, 31, 7, 14, 12, 30, 15)])
    assert rig.date() == datetime.datetime(2031, 7, 14, 12, 30, 15)
    rig.now_ns += SECOND // 2
    assert rig.date() == datetime.datetime(2031, 7, 14, 12, 30, 16)
    assert rig.read(Register.STATUS_A) == 0x26


def test_it_stands_while_it_is_set() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.write(Register.STATUS_B, SET)
    rig.write(Register.MINUTES, 0x30)
    rig.now_ns += 5 * SECOND
    assert rig.fields() == [20, 25, 1, 1, 0, 30, 0]
    rig.now_ns += SECOND - 1
    assert not rig.read(Register.STATUS_A) & UIP


def test_one_register_can_be_set_on_its_own() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1, 10))
    rig.write(Register.HOURS, 0x17)
    assert rig.date() == datetime.datetime(2025, 1, 1, 17)


@pytest.mark.parametrize("values", [
    (0x20, 0x25, 0x02, 0x30, 0x00, 0x00, 0x00),  # 30 February
    (0x20, 0x25, 0x13, 0x01, 0x00, 0x00, 0x00),
    (0x20, 0x25, 0x00, 0x01, 0x00, 0x00, 0x00),
    (0x20, 0x25, 0x01, 0x01, 0x24, 0x00, 0x00),
    (0x20, 0x25, 0x01, 0x01, 0x00, 0x00, 0x60),
    (0x20, 0xFF, 0x01, 0x01, 0x00, 0x00, 0x00),
    (0xA0, 0x25, 0x01, 0x01, 0x00, 0x00, 0x00),
])  # fmt: skip
def test_what_is_no_date_is_not_taken(values: tuple[int, ...]) -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.set(list(values))
    assert rig.date() == datetime.datetime(2025, 1, 1)


def test_after_the_last_century_comes_the_first() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.set([bcd(value) for value in (99, 99, 12, 31, 23, 59, 59)])
    rig.now_ns += SECOND
    assert rig.fields() == [0, 0, 1, 1, 0, 0, 0]
    rig.set([bcd(value) for value in (0, 0, 1, 1, 0, 0, 0)])
    rig.now_ns -= SECOND
    assert rig.fields()[-3:] == [23, 59, 59]


def test_no_interrupt_can_be_enabled_and_the_mode_is_fixed() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.write(Register.STATUS_B, 0x7D)
    assert rig.read(Register.STATUS_B) == 0x02
    rig.write(Register.STATUS_C, 0xFF)
    rig.write(Register.STATUS_D, 0x00)
    assert (rig.read(Register.STATUS_C), rig.read(Register.STATUS_D)) == (0x00, 0x80)


def test_the_rest_is_ram() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.write(0x0F, 0x0A)  # the shutdown code, which Linux sets before it starts a CPU
    rig.write(0x7F, 0x55)
    assert (rig.read(0x0F), rig.read(0x7F), rig.read(0x10)) == (0x0A, 0x55, 0x00)


def test_the_nmi_mask_is_no_part_of_the_index() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    assert rig.read(0x80 | Register.STATUS_D) == 0x80
    assert rig.chip.read(0, 1) == 0xFF


def test_a_wide_write_sets_index_and_data() -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    rig.chip.write(0, 2, 0x5A20)
    assert rig.read(0x20) == 0x5A


@given(accesses=st.lists(st.tuples(
    st.sampled_from(["index", "write", "read"]), st.integers(0, 0xFF), st.integers(0, 2**34),
), max_size=80))
def test_no_sequence_of_accesses_breaks_it(accesses: list[tuple[str, int, int]]) -> None:
    rig = Rig(datetime.datetime(2025, 1, 1))
    for kind, value, later_ns in accesses:
        rig.now_ns += later_ns
        if kind == "read":
            assert 0 <= rig.chip.read(1, 1) <= 0xFF
        else:
            rig.chip.write(0 if kind == "index" else 1, 1, value)
