"""Fault 33: a guest that polls the 16550A for input gets it; a driver that starts it loses none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices import serial as uart
from pyvmm.devices.serial import FIFO_SIZE, POLLS, Register, Serial

LOOKS = 3 * POLLS
"""More than any guest here needs until it gets its first byte."""


class Host:
    """A UART whose host side offers what is typed whenever the UART says that there is room."""

    def __init__(self, typed: bytes = b"") -> None:
        self.sent = bytearray()
        self.waiting = bytearray()
        self.levels: list[bool] = []
        self.serial = Serial(self.sent.extend, self.levels.append, self._offer)
        self.type(typed)

    def type(self, data: bytes) -> None:
        self.waiting += data
        self._offer()

    def _offer(self) -> None:
        taken = None
        while self.waiting and taken != 0:
            taken = self.serial.receive(bytes(self.waiting))
            del self.waiting[:taken]

    def read(self, register: Register) -> int:
        return self.serial.read(register, 1)

    def write(self, register: Register, value: int) -> None:
        self.serial.write(register, 1, value)

    def has_byte(self) -> bool:
        return bool(self.read(Register.LSR) & uart.LSR_DATA_READY)

    def send(self, text: bytes) -> None:
        """As a driver does that polls to transmit."""
        for byte in text:
            assert self.read(Register.LSR) & uart.LSR_THRE
            self.write(Register.DATA, byte)

    def print(self, text: bytes) -> None:
        """A line of Linux's console (serial8250_console_write)."""
        ier = self.read(Register.IER)
        self.write(Register.IER, 0)
        self.send(text)
        assert self.read(Register.LSR) & uart.LSR_TEMT
        self.write(Register.IER, ier)


def look_then_read(host: Host) -> int | None:
    return host.read(Register.DATA) if host.has_byte() else None


def read_blindly(host: Host) -> int | None:
    return host.read(Register.DATA) or None


def look_between_characters(host: Host) -> int | None:
    """It shows its screen all the time; of each character's look at LSR it uses both bits."""
    status = host.read(Register.LSR)
    host.write(Register.DATA, ord("."))
    return host.read(Register.DATA) if status & uart.LSR_DATA_READY else None


def look_beside_the_screen(host: Host) -> int | None:
    """memtest86+: get_key() looks once, then the screen goes out, each character with a look."""
    key = look_then_read(host)
    host.send(b"screen")
    return key


def raise_rts_around_it(host: Host) -> int | None:
    """Flow control by hand."""
    host.write(Register.MCR, uart.MCR_DTR | uart.MCR_RTS)
    ready = host.has_byte()
    host.write(Register.MCR, uart.MCR_DTR)
    return host.read(Register.DATA) if ready else None


def disable_interrupts_before_each(host: Host) -> int | None:
    """A boot loader's getc that takes no chances."""
    host.write(Register.IER, 0)
    return look_then_read(host)


def set_all_up_before_each(host: Host) -> int | None:
    fifo = host.read(Register.IIR_FCR) & uart.IIR_FIFO_ON
    host.write(Register.IIR_FCR, uart.FCR_ENABLE if fifo else 0)
    return disable_interrupts_before_each(host)


READERS = (disable_interrupts_before_each, set_all_up_before_each, look_then_read,
           read_blindly, look_between_characters, look_beside_the_screen,
           raise_rts_around_it)


@pytest.mark.parametrize("fcr", [0, uart.FCR_ENABLE, 0xC7], ids=["fifo off", "fifo on", "cleared"])
@pytest.mark.parametrize("typed_early", [True, False])
@pytest.mark.parametrize("get_byte", READERS)
def test_fault_33_a_polling_guest_gets_what_is_typed(
    get_byte: Callable[[Host], int | None], typed_early: bool, fcr: int
) -> None:
    text = b"hello, polling guest, this is more than a FIFO of input\r"
    host = Host(text if typed_early else b"")
    host.write(Register.IER, 0)
    host.write(Register.LCR, uart.LCR_DLAB | 3)
    host.write(Register.DATA, 1)
    host.write(Register.IER, 0)
    host.write(Register.LCR, 3)
    host.write(Register.IIR_FCR, fcr)
    host.write(Register.MCR, uart.MCR_DTR | uart.MCR_RTS)
    if not typed_early:
        for _ in range(100):
            assert get_byte(host) is None
        host.type(text)
    got = [byte for _ in range(LOOKS + len(text)) if (byte := get_byte(host)) is not None]
    assert bytes(got) == text
    assert not any(host.levels), "and never interrupts a driver that asked for none"


def test_fault_33_a_guest_that_never_set_the_chip_up_gets_it_too() -> None:
    host = Host(b"key")
    got = [byte for _ in range(LOOKS) if (byte := look_then_read(host)) is not None]
    assert bytes(got) == b"key"


def test_fault_33_kgdb_polls_between_what_it_prints() -> None:
    """serial8250_put_poll_char saves and restores IER around every character."""
    host = Host()
    got = bytearray()
    for key in b"bt\r":
        host.type(bytes([key]))
        for _ in range(LOOKS):
            if (byte := look_then_read(host)) is not None:
                got.append(byte)
                host.print(bytes([byte]))
                break
    assert (bytes(got), bytes(host.sent)) == (b"bt\r", b"bt\r")


def test_fault_33_looking_at_the_divisor_or_in_loopback_is_no_polling() -> None:
    host = Host(b"x")
    host.write(Register.LCR, uart.LCR_DLAB)
    for _ in range(LOOKS):
        assert host.read(Register.DATA) == 12
    host.write(Register.LCR, 3)
    host.write(Register.MCR, uart.MCR_LOOP)
    for _ in range(LOOKS):
        assert not host.has_byte()
    host.write(Register.MCR, uart.MCR_OUT2)
    assert host.waiting == b"x"
    assert not host.has_byte()


def linux(host: Host) -> Iterator[None]:
    """drivers/tty/serial/8250/8250_port.c: autoconfig(), then serial8250_do_startup(); in between,
    at each ``yield``, anything may be typed and another CPU may print."""
    clear = uart.FCR_ENABLE | uart.FCR_CLEAR_RX | 0x04

    def clear_fifos() -> None:
        for value in (uart.FCR_ENABLE, clear, 0):
            host.write(Register.IIR_FCR, value)

    def clear_interrupts() -> None:
        for register in (Register.LSR, Register.DATA, Register.IIR_FCR, Register.MSR):
            host.read(register)

    yield
    host.write(Register.IER, 0)
    host.write(Register.IER, 0x0F)
    yield
    host.write(Register.IER, 0)
    host.write(Register.MCR, uart.MCR_LOOP | 0x0A)
    host.read(Register.MSR)
    host.write(Register.MCR, uart.MCR_OUT2)
    yield
    host.write(Register.IIR_FCR, uart.FCR_ENABLE)
    host.read(Register.IIR_FCR)
    clear_fifos()
    host.read(Register.DATA)
    host.write(Register.IER, 0)
    yield
    clear_fifos()
    clear_interrupts()
    host.read(Register.LSR)
    host.write(Register.LCR, 3)
    yield  # request_irq() takes its time
    host.write(Register.MCR, uart.MCR_OUT2 | uart.MCR_DTR | uart.MCR_RTS)
    host.write(Register.IER, uart.IER_THRE)
    host.read(Register.LSR)
    host.read(Register.IIR_FCR)
    host.write(Register.IER, 0)
    clear_interrupts()
    host.write(Register.IER, uart.IER_RX | uart.IER_LINE)
    yield
    host.write(Register.IIR_FCR, clear)
    yield


@given(st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 100)), min_size=7, max_size=7),
       st.booleans())
def test_fault_33_linux_loses_nothing_typed_while_it_prints_and_starts_the_chip(
    steps: list[tuple[bytes, int]], has_early_console: bool
) -> None:
    host = Host()
    for (typed, length), _ in zip(steps, linux(host), strict=True):
        # earlyprintk writes no IER, so that what it looks at counts on.
        (host.send if has_early_console else host.print)(bytes(length))
        host.type(typed)
    got = bytearray()
    for _ in range(40 * 7):
        if host.levels and host.levels[-1]:
            assert host.read(Register.IIR_FCR) & 0x0F == uart.IIR_RX
            got.append(host.read(Register.DATA))
            host.print(b"x" * (len(got) % 20))
    assert got == b"".join(typed for typed, _ in steps)


def test_fault_33_a_full_fifo_is_withdrawn_and_comes_back_in_order() -> None:
    host = Host(bytes(range(1, 41)))
    host.send(bytes(POLLS + 1))
    assert host.has_byte()
    host.write(Register.IER, uart.IER_MODEM)
    assert host.read(Register.DATA) == 0
    assert len(host.waiting) == 40 - FIFO_SIZE
    got = [byte for _ in range(LOOKS + 40) if (byte := look_then_read(host)) is not None]
    assert bytes(got) == bytes(range(1, 41))
