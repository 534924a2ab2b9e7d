"""The devices on the port bus, whatever the guest reads and writes there, and what is typed."""

from __future__ import annotations

import struct
from collections.abc import Callable

from fuzz.source import Source
from fuzz.target import Target
from pyvmm.board.bus import Bus
from pyvmm.board.polled_uart import PolledUart
from pyvmm.devices.boot_timer import BootTimer
from pyvmm.devices.debug_exit import DebugExit
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.power import Power
from pyvmm.devices.pvpanic import PvPanic
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Register, Serial
from pyvmm.kvm.exits import RING_CAPACITY, CoalescedRing
from pyvmm.x86 import layout

_DATA = layout.SERIAL_PORT + int(Register.DATA)
_LCR, _MCR = layout.SERIAL_PORT + int(Register.LCR), layout.SERIAL_PORT + int(Register.MCR)
_DLAB, _LOOP = 0x80, 0x10
_ENTRY = struct.Struct("<QII8s")
_MOST_MARKS = 100_000


class Ports:
    """The port bus of a machine, and a model of what goes through its UART.

    ``typed`` are the bytes that the UART has taken, ``read`` those the guest has read of them;
    ``written`` are the bytes that the guest has sent, and ``sent`` those that have come out.
    """

    def __init__(self) -> None:
        self.typed, self.read = bytearray(), bytearray()
        self.written, self.sent = bytearray(), bytearray()
        self._gathers = False
        self._page = bytearray(4096)
        self._indices = memoryview(self._page)[:8].cast("I")
        self._serial = Serial(self.sent.extend, lambda level: None)
        self.uart = PolledUart(
            self._serial, ring=CoalescedRing(memoryview(self._page)), gather=self._gather,
            begin=lambda: None,
        )
        self.bus = Bus("PIO", 0)
        ended: list[object] = []
        keyboard = I8042(lambda: ended.append("reset"))
        nothing: Callable[[], None] = lambda: None  # noqa: E731
        self._timer = BootTimer()
        self._now_ns = 1_700_000_000_000_000_000
        for port, length, device in (
            (layout.BOOT_TIMER_PORT, BootTimer.LENGTH, self._timer),
            (layout.RTC_INDEX, Rtc.LENGTH, Rtc(lambda: self._now_ns)),
            (layout.I8042_DATA, 1, keyboard.data_port),
            (layout.I8042_COMMAND, 1, keyboard.command_port),
            (layout.SLEEP_CONTROL_PORT, Power.LENGTH, Power(
                s5_sleep_type=5, reset_value=6, on_power_off=nothing, on_reset=nothing)),
            (layout.PVPANIC_PORT, PvPanic.LENGTH, PvPanic(nothing, nothing)),
            (layout.DEBUG_EXIT_PORT, DebugExit.LENGTH, DebugExit(ended.append)),
            (layout.SERIAL_PORT, Serial.LENGTH, self.uart),
        ):
            self.bus.add(port, length, device)

    def _gather(self, on: bool) -> None:
        self._gathers = on

    def host(self, source: Source) -> None:
        """Something happens on the host."""
        match source.number(0, 3):
            case 0:
                data = source.take(source.bits(5))
                self.typed += data[: self._serial.receive(data)]
            case 1:
                self.uart.tick()
            case 2:
                self.uart.flush()
            case 3:  # to and fro, as a clock that is set
                self._now_ns = max(0, self._now_ns + (source.bits(64) - (1 << 63)))

    def guest_reads(self, port: int, size: int) -> None:
        """IN: the value fits, and what comes from the UART is what was typed."""
        has_data = self.bus.read(layout.SERIAL_PORT + Register.LSR, 1) & 1
        is_received = port == _DATA and has_data and not self._lcr & _DLAB
        value = self.bus.read(port, size)
        assert 0 <= value < 1 << 8 * size, value
        if is_received and not self._mcr & _LOOP:
            self.read.append(value & 0xFF)
            assert self.typed.startswith(self.read), (self.typed, self.read)

    @property
    def _lcr(self) -> int:
        return self.bus.read(_LCR, 1)

    @property
    def _mcr(self) -> int:
        return self.bus.read(_MCR, 1)

    def guest_writes(self, port: int, size: int, value: int) -> None:
        """OUT: bytes for the UART's first port go where KVM puts them."""
        value &= (1 << 8 * size) - 1
        is_sent = port == _DATA and not self._lcr & _DLAB and not self._mcr & _LOOP
        if is_sent and size > 1:
            return  # which of the bytes that go to other registers matter, no model says
        if is_sent:
            self.written.append(value)
        if not (port == _DATA and size == 1 and self._gathers and self._put(value)):
            self.bus.write(port, size, value)

    def _put(self, value: int) -> bool:
        """KVM gathers a byte, if there is room (virt/kvm/coalesced_mmio.c)."""
        first, last = self._indices
        following = (last + 1) % RING_CAPACITY
        if following == first:
            return False
        _ENTRY.pack_into(self._page, 8 + last * _ENTRY.size, _DATA, 1, 1, bytes([value]))
        self._indices[1] = following
        return True

    def check_end(self) -> None:
        """Nothing sent is lost or doubled, and nothing remembers more than it may."""
        self.uart.flush()
        assert self.sent == self.written, (self.sent, self.written)
        assert len(self._timer.marks) < _MOST_MARKS


class PortsTarget(Target):
    """No access raises; the UART loses no byte."""

    is_structured = True
    max_bytes = 4096

    def run(self, data: bytes) -> None:
        """Do the accesses that ``data`` describes."""
        source, ports = Source(data), Ports()
        bases = (layout.SERIAL_PORT, layout.RTC_INDEX, layout.I8042_DATA, layout.I8042_COMMAND,
                 layout.SLEEP_CONTROL_PORT, layout.PVPANIC_PORT, layout.DEBUG_EXIT_PORT,
                 layout.BOOT_TIMER_PORT)
        while source.more:
            kind = source.bits(8)
            if kind < 32:
                ports.host(source)
                continue
            if kind < 64:  # a driver that polls
                for byte in source.take(source.bits(7)):
                    ports.guest_reads(layout.SERIAL_PORT + Register.LSR, 1)
                    ports.guest_writes(_DATA, 1, byte)
                continue
            base = layout.SERIAL_PORT if kind < 160 else source.pick(bases)
            port = base + source.bits(3) if kind < 250 else source.bits(16)
            size = source.pick((1, 1, 1, 2, 4))
            if kind & 1:
                ports.guest_reads(port, size)
            else:
                ports.guest_writes(port, size, source.bits(8 * size))
        ports.check_end()
        self._any_ring(data)

    def _any_ring(self, data: bytes) -> None:
        """KVM's ring with any contents: what is taken is bounded, then it is empty or goes on."""
        page = bytearray(data[:4096].ljust(4096, b"\0"))
        page[:4] = bytes(4)  # the first index is ours
        ring = CoalescedRing(memoryview(page))
        taken = ring.take()
        assert len(taken) <= RING_CAPACITY
        assert all(len(piece) <= 8 for _, piece in taken)
        ring.release()


def make() -> Target:
    """Return the target."""
    return PortsTarget()
