"""The MC146818 real-time clock and its 128 bytes of CMOS RAM (Motorola MC146818A data sheet).

It always counts in BCD and 24 hours, in UTC; the century is where PCs keep it.  It has no
interrupts: their enable bits cannot be set.  A guest that sets the clock moves this clock only,
never the host's.

A reader must not see half an update.  The chip promises 244 us after a clear UIP.  That is too
little here, because every register takes two exits.  So the registers hold still for ``HOLD_NS``
from the read of status A that found UIP clear.  Without one, they do so from the first read of a
time register.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyvmm.devices.byte_device import ByteDevice
from pyvmm.startup.types import IntEnum

HOLD_NS = 100_000_000
_SECOND_NS = 1_000_000_000
_UPDATE_NS = 244_000  # UIP announces an update so long before it
_RAM_BYTES = 128
_MAX_AHEAD_NS = 10_000 * 366 * 86_400 * _SECOND_NS
"""A guest can set the years 0 to 9999."""


class Register(IntEnum):
    """The chip's registers; every other byte is RAM, which keeps what is written."""

    SECONDS = 0x00
    MINUTES = 0x02
    HOURS = 0x04
    WEEKDAY = 0x06
    DAY = 0x07
    MONTH = 0x08
    YEAR = 0x09
    STATUS_A = 0x0A
    STATUS_B = 0x0B
    STATUS_C = 0x0C
    STATUS_D = 0x0D
    CENTURY = 0x32


A_UPDATE_IN_PROGRESS, A_DIVIDER_32_KHZ, A_RATE_1024_HZ = 0x80, 0x20, 0x06
B_SET, B_24_HOURS = 0x80, 0x02
D_VALID = 0x80
INDEX_MASK = 0x7F  # bit 7 of the index port masks NMIs, of which there are none

_TIME = frozenset({
    Register.SECONDS, Register.MINUTES, Register.HOURS, Register.WEEKDAY,
    Register.DAY, Register.MONTH, Register.YEAR, Register.CENTURY,
})  # fmt: skip


class Rtc(ByteDevice):
    """Two ports: index and data.  ``now_ns`` is the host's UTC in nanoseconds since 1970.

    The lock is for guests whose vCPUs use the chip at the same time.  They read nonsense, as on a
    PC, but break nothing.
    """

    LENGTH = 2

    def __init__(self, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._index = 0
        self._ram = bytearray(_RAM_BYTES)
        self._ram[Register.STATUS_A] = A_DIVIDER_32_KHZ | A_RATE_1024_HZ
        self._ahead_ns = 0  # of the host's clock
        self._held_ns: int | None = None
        self._setting = False  # the clock stands, and its registers are in _ram

    def read_byte(self, offset: int) -> int:
        """Return the register that the index names; the index itself is write-only."""
        if offset == 0:
            return 0xFF
        with self._lock:
            return self._read(self._index)

    def write_byte(self, offset: int, value: int) -> None:
        """Set the index, or the register that it names."""
        with self._lock:
            if offset == 0:
                self._index = value & INDEX_MASK
            else:
                self._write(self._index, value)

    def save(self) -> dict[str, object]:
        """Return the chip's state.  The time is kept as a distance to the host's clock.

        So a restored guest that reads the chip finds the date of then, not that of the save.
        """
        with self._lock:
            return {
                "index": self._index, "ram": bytes(self._ram), "ahead_ns": self._ahead_ns,
                "held_ns": self._held_ns, "setting": self._setting,
            }

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("rtc", data)
        index = fields.integer("index", 0, INDEX_MASK)
        ram = fields.octets("ram", _RAM_BYTES, _RAM_BYTES)
        if ram[Register.STATUS_A] & A_UPDATE_IN_PROGRESS:
            raise fields.error("ram", f"has {A_UPDATE_IN_PROGRESS:#x} set in status A")
        ahead_ns = fields.integer("ahead_ns", -_MAX_AHEAD_NS, _MAX_AHEAD_NS)
        held_ns = fields.optional_integer("held_ns", 0, _MAX_AHEAD_NS)
        setting = fields.boolean("setting")
        fields.end()
        with self._lock:
            self._index, self._ram, self._setting = index, bytearray(ram), setting
            self._ahead_ns, self._held_ns = ahead_ns, held_ns

    def _read(self, index: int) -> int:
        match index:
            case Register.STATUS_A:
                return self._ram[index] | self._read_update_in_progress()
            case Register.STATUS_B:
                return B_24_HOURS | (B_SET if self._setting else 0)
            case Register.STATUS_C:
                return 0
            case Register.STATUS_D:
                return D_VALID
            case _ if index in _TIME and not self._setting:
                return self._time_registers()[index]
            case _:
                return self._ram[index]

    def _write(self, index: int, value: int) -> None:
        match index:
            case Register.STATUS_A:
                self._ram[index] = value & ~A_UPDATE_IN_PROGRESS
            case Register.STATUS_B:
                self._write_set(bool(value & B_SET))
            case Register.STATUS_C | Register.STATUS_D:
                pass  # read-only
            case _ if index in _TIME and not self._setting:
                self._write_set(True)
                self._ram[index] = value
                self._write_set(False)
            case _:
                self._ram[index] = value

    def _read_update_in_progress(self) -> int:
        """Return UIP.  If it is clear, the time registers hold still from now on."""
        if self._setting:
            return 0
        now_ns = self._now_ns()
        if (now_ns + self._ahead_ns) % _SECOND_NS >= _SECOND_NS - _UPDATE_NS:
            return A_UPDATE_IN_PROGRESS
        self._held_ns = now_ns
        return 0

    def _time_registers(self) -> dict[int, int]:
        now_ns = self._now_ns()
        if self._held_ns is None or not 0 <= now_ns - self._held_ns < HOLD_NS:
            self._held_ns = now_ns
        clock = time.gmtime((self._held_ns + self._ahead_ns) // _SECOND_NS)
        century, year = divmod(clock.tm_year % 10_000, 100)
        return {
            Register.SECONDS: _to_bcd(clock.tm_sec),
            Register.MINUTES: _to_bcd(clock.tm_min),
            Register.HOURS: _to_bcd(clock.tm_hour),
            Register.WEEKDAY: (clock.tm_wday + 1) % 7 + 1,  # the chip's week starts on Sunday, at 1
            Register.DAY: _to_bcd(clock.tm_mday),
            Register.MONTH: _to_bcd(clock.tm_mon),
            Register.YEAR: _to_bcd(year),
            Register.CENTURY: _to_bcd(century),
        }

    def _write_set(self, setting: bool) -> None:
        """Set status B's SET: stop the clock, or let it go on from the time in its registers."""
        if setting and not self._setting:
            for index, value in self._time_registers().items():
                self._ram[index] = value
        elif self._setting and not setting:
            self._start_from_registers()
        self._setting = setting

    def _start_from_registers(self) -> None:
        """Go on from the registers; from the time before, if they hold no date.

        The next second begins half a second from now, as on the chip when its divider is let go.
        Linux sets the time at the moment that makes this right.
        """
        seconds = _to_seconds(self._ram)
        if seconds is not None:
            self._ahead_ns = seconds * _SECOND_NS + _SECOND_NS // 2 - self._now_ns()
        self._held_ns = None


def _to_bcd(value: int) -> int:
    return value // 10 << 4 | value % 10


def _from_bcd(value: int) -> int:
    """Return the number, or -1 if a digit is above 9."""
    high, low = value >> 4, value & 0xF
    return high * 10 + low if high < 10 and low < 10 else -1


def _to_seconds(ram: bytearray) -> int | None:
    """Return the time registers as seconds since 1970; None if there is no such moment."""
    fields = (
        Register.CENTURY, Register.YEAR, Register.MONTH, Register.DAY,
        Register.HOURS, Register.MINUTES, Register.SECONDS,
    )  # fmt: skip
    digits = [_from_bcd(ram[field]) for field in fields]
    if min(digits) < 0:
        return None
    century, year_of_century, month, day, hour, minute, second = digits
    year = century * 100 + year_of_century
    # Days of the proleptic Gregorian calendar, in years that begin in March so that the odd day
    # comes last.  A nonsensical date gives the days of another date, which the last line notices.
    march_year = year - (month <= 2)
    days = march_year * 365 + march_year // 4 - march_year // 100 + march_year // 400
    days += (153 * ((month + 9) % 12) + 2) // 5 + day - 1 - 719_468
    seconds = days * 86_400 + hour * 3600 + minute * 60 + second
    said = (year, month, day, hour, minute, second)
    return seconds if time.gmtime(seconds)[:6] == said else None
