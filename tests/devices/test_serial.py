"""The 16550A as a driver sees it: registers, interrupts, and no byte lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.board.bus import Bus
from pyvmm.devices import serial as uart
from pyvmm.devices.serial import FIFO_SIZE, Register, Serial


class Rig:
    """A UART with its line, its host side and a polite driver's start-up done."""

    def __init__(self, ier: int = uart.IER_RX) -> None:
        self.sent = bytearray()
        self.edges: list[bool] = []
        self.rooms = 0
        self.serial = Serial(self.sent.extend, self.edges.append, self._room)
        self.write(Register.IIR_FCR, uart.FCR_ENABLE)
        self.write(Register.IER, ier)

    def _room(self) -> None:
        self.rooms += 1

    def irq(self) -> bool:
        return bool(self.edges) and self.edges[-1]

    def read(self, register: Register) -> int:
        return self.serial.read(register, 1)

    def write(self, register: Register, value: int) -> None:
        self.serial.write(register, 1, value)


def test_transmitted_bytes_reach_the_host_in_order() -> None:
    rig = Rig()
    for byte in b"Linux\n":
        assert rig.read(Register.LSR) & uart.LSR_THRE
        rig.write(Register.DATA, byte)
    assert rig.sent == b"Linux\n"


def test_thr_empty_interrupts_once_per_byte_until_iir_is_read() -> None:
    rig = Rig(ier=0)
    rig.write(Register.IER, uart.IER_THRE)
    assert rig.irq(), "the register is empty when the interrupt is enabled"
    assert rig.read(Register.IIR_FCR) == uart.IIR_FIFO_ON | uart.IIR_THRE
    assert not rig.irq()
    assert rig.read(Register.IIR_FCR) == uart.IIR_FIFO_ON | uart.IIR_NONE
    rig.write(Register.DATA, ord("a"))
    assert rig.irq()
    rig.write(Register.IER, 0)
    assert not rig.irq()


def test_received_bytes_raise_the_line_until_all_are_read() -> None:
    rig = Rig()
    assert rig.serial.receive(b"ab") == 2
    assert rig.irq()
    assert rig.read(Register.IIR_FCR) & 0x0F == uart.IIR_RX
    assert rig.read(Register.LSR) & uart.LSR_DATA_READY
    assert rig.read(Register.DATA) == ord("a")
    assert rig.irq()
    assert rig.read(Register.DATA) == ord("b")
    assert not rig.irq()
    assert not rig.read(Register.LSR) & uart.LSR_DATA_READY
    assert rig.read(Register.DATA) == 0


def test_reception_has_priority_over_transmission() -> None:
    rig = Rig(ier=uart.IER_RX | uart.IER_THRE)
    rig.serial.receive(b"x")
    assert rig.read(Register.IIR_FCR) & 0x0F == uart.IIR_RX
    assert rig.read(Register.IIR_FCR) & 0x0F == uart.IIR_RX, "reading IIR does not take it back"
    rig.read(Register.DATA)
    assert rig.read(Register.IIR_FCR) & 0x0F == uart.IIR_THRE


@given(data=st.binary(max_size=200))
def test_a_full_fifo_takes_no_more_and_loses_nothing(data: bytes) -> None:
    rig = Rig()
    waiting, got = data, bytearray()
    while waiting or rig.read(Register.LSR) & uart.LSR_DATA_READY:
        taken = rig.serial.receive(waiting)
        assert taken <= FIFO_SIZE
        waiting = waiting[taken:]
        rooms = rig.rooms
        while rig.read(Register.LSR) & uart.LSR_DATA_READY:
            got.append(rig.read(Register.DATA))
        assert rig.rooms == rooms + 1, "the host is told when there is room again"
    assert got == data


def test_bytes_wait_until_the_driver_listens() -> None:
    rig = Rig(ier=0)
    assert rig.serial.receive(b"early") == 0
    rooms = rig.rooms
    rig.write(Register.IER, uart.IER_RX)
    assert rig.rooms == rooms + 1
    assert rig.serial.receive(b"early") == 5


def test_out2_gates_the_interrupt_line() -> None:
    rig = Rig()
    rig.write(Register.MCR, 0)
    rig.serial.receive(b"x")
    assert not rig.irq()
    rig.write(Register.MCR, uart.MCR_OUT2)
    assert rig.irq()


def test_loopback_as_linux_probes_it() -> None:
    rig = Rig()
    rig.write(Register.MCR, uart.MCR_LOOP | uart.MCR_OUT2 | uart.MCR_RTS)
    assert rig.read(Register.MSR) & 0xF0 == uart.MSR_DCD | uart.MSR_CTS
    rig.write(Register.DATA, 0x55)
    assert rig.sent == b"", "nothing leaves the chip"
    assert rig.serial.receive(b"x") == 0, "nothing enters it"
    assert rig.read(Register.DATA) == 0x55
    rig.write(Register.MCR, uart.MCR_OUT2)
    assert rig.serial.receive(b"x") == 1


def test_divisor_latch_hides_data_and_ier() -> None:
    rig = Rig()
    rig.write(Register.LCR, uart.LCR_DLAB | 0x03)
    rig.write(Register.DATA, 0x01)
    rig.write(Register.IER, 0x02)
    assert (rig.read(Register.DATA), rig.read(Register.IER)) == (0x01, 0x02)
    rig.write(Register.LCR, 0x03)
    assert rig.sent == b""
    assert rig.read(Register.IER) == uart.IER_RX


def test_what_is_typed_while_linux_probes_is_not_lost() -> None:
    """autoconfig() writes 0x0f to IER for a moment; startup() clears the FIFO and reads RBR."""
    rig = Rig(ier=0)
    rig.write(Register.IER, 0x0F)
    assert rig.serial.receive(b"early") == 5
    rig.write(Register.IER, 0)
    rig.write(Register.IIR_FCR, uart.FCR_ENABLE | uart.FCR_CLEAR_RX)
    assert not rig.irq()
    assert not rig.read(Register.LSR) & uart.LSR_DATA_READY
    assert rig.read(Register.DATA) == 0
    rig.write(Register.MCR, uart.MCR_LOOP)
    rig.write(Register.DATA, 0x55)
    rig.write(Register.IIR_FCR, uart.FCR_ENABLE | uart.FCR_CLEAR_RX)
    rig.write(Register.MCR, uart.MCR_OUT2)
    rig.write(Register.IER, uart.IER_RX)
    assert rig.irq()
    assert bytes(rig.read(Register.DATA) for _ in range(5)) == b"early"
    assert rig.serial.receive(b"later") == 5
    assert rig.read(Register.DATA) == ord("l")


def test_scratch_register_keeps_its_value() -> None:
    rig = Rig()
    rig.write(Register.SCR, 0xA5)
    assert rig.read(Register.SCR) == 0xA5


@given(accesses=st.lists(st.tuples(
    st.booleans(), st.integers(0, 7), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1),
    st.binary(max_size=20),
), max_size=60))
def test_no_sequence_of_accesses_breaks_it(
    accesses: list[tuple[bool, int, int, int, bytes]],
) -> None:
    rig = Rig()
    bus = Bus("PIO", 0)
    bus.add(0x3F8, Serial.LENGTH, rig.serial)
    for is_write, offset, size, value, typed in accesses:
        if is_write:
            bus.write(0x3F8 + offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bus.read(0x3F8 + offset, size) < 1 << 8 * size
        assert rig.serial.receive(typed) <= min(len(typed), FIFO_SIZE)


@pytest.mark.parametrize("size", [2, 4])
def test_a_wide_access_is_a_run_of_byte_accesses(size: int) -> None:
    rig = Rig()
    rig.serial.write(Register.MSR, 2, 0x4200)  # MSR ignores it, SCR after it takes 0x42
    assert rig.serial.read(Register.MSR, 2) >> 8 == 0x42
    assert rig.serial.read(Register.LCR, size) & 0xFF == 0x03
