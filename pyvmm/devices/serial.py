"""A 16550A UART with real interrupts (National Semiconductor PC16550D data sheet).

Transmission takes no time: THRE and TEMT are always set, and writing THR raises the THR-empty
interrupt again.  The guest paces reception.  The receive FIFO holds 16 bytes, and the host's bytes
wait outside until there is room and the guest listens, so an overrun loses none.  Neither does a
driver that clears the FIFO: unread bytes are received anew.  Linux does so while it probes and
starts a UART, after it had the interrupt enabled for a moment.

A guest listens once it has enabled the receive interrupt, or polls.  Two drivers poll LSR alike:
one for input, and one that only transmits, as Linux's early console does.  They need not be told
apart, because the second one ignores LSR.DR and leaves the FIFO alone.  But a driver that starts
the chip reads RBR too, to empty it (Linux's serial8250_do_startup: FCR, LSR, RBR; IER, LSR, RBR).
So a guest counts as polling only if it goes on looking after it set the chip up.  While it sets the
chip up, the FIFO holds nothing that it could throw away.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from pyvmm.devices.byte_device import ByteDevice
from pyvmm.startup.types import IntEnum

FIFO_SIZE = 16


class Register(IntEnum):
    """Offsets; 0 and 1 are the divisor latch while LCR.DLAB is set."""

    DATA = 0  # read RBR, write THR, or DLL
    IER = 1  # or DLM
    IIR_FCR = 2  # read IIR, write FCR
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7


IER_RX, IER_THRE, IER_LINE, IER_MODEM = 0x01, 0x02, 0x04, 0x08
IIR_NONE, IIR_THRE, IIR_RX, IIR_FIFO_ON = 0x01, 0x02, 0x04, 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 0x01, 0x02
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DATA_READY, LSR_THRE, LSR_TEMT = 0x01, 0x20, 0x40
LSR_IDLE = LSR_THRE | LSR_TEMT
POLLS = 8
"""Reads of LSR and RBR after which the guest counts as polling.

The count begins anew at a write that changes IER or FCR or clears the FIFO.  Linux's probe and its
start-up make at most four reads between two such writes.  A boot loader may write IER as it is
before each look: that sets nothing up.
"""
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80


class Serial(ByteDevice):
    """The UART.  ``transmit`` gets each byte sent; ``set_irq`` is the interrupt line's level.

    ``on_room`` is called (from the vCPU's thread) when the guest has emptied the receive FIFO, so
    that the host may ``receive()`` more.  The vCPU's thread uses the registers, the console's
    thread ``receive``; the lock is held for the few instructions between them.
    """

    LENGTH = 8

    def __init__(
        self,
        transmit: Callable[[bytes], None],
        set_irq: Callable[[bool], None],
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._transmit = transmit
        self._set_irq = set_irq
        self._on_room = on_room
        self._lock = threading.Lock()
        self._fifo: deque[int] = deque()
        self._again = b""  # taken from the host, cleared out of the FIFO unread
        self._ier = 0
        self._fcr = 0
        self._lcr = 0x03
        self._mcr = MCR_OUT2
        self._scr = 0
        self._divisor = 12
        self._thre_pending = False
        self._irq_level = False
        self._looks_missing = POLLS  # until the guest is taken to poll
        # Two of these calls make one character of the console: a table, not a chain of tests.
        self._readers = (
            self._read_data, self._read_ier, self._read_iir, self._read_lcr,
            self._read_mcr, self._read_lsr, self._read_msr, self._read_scr,
        )
        self._writers = (
            self._write_data, self._write_ier, self._write_fcr, self._write_lcr,
            self._write_mcr, self._write_read_only, self._write_read_only, self._write_scr,
        )

    def receive(self, data: bytes) -> int:
        """Put as much of ``data`` as fits into the receive FIFO; return the number of bytes
        taken."""
        with self._lock:
            self._refill()
            if self._again or not self._listens():
                return 0  # the bytes wait
            taken = data[: FIFO_SIZE - len(self._fifo)]
            self._fifo.extend(taken)
            self._update_irq()
            return len(taken)

    @property
    def interrupts_when_empty(self) -> bool:
        """True if the driver waits for the transmitter's interrupt and does not poll."""
        return bool(self._ier & IER_THRE)

    def send(self, data: bytes) -> None:
        """Take ``data`` as if it was written to the first register, byte by byte."""
        with self._lock:
            plain = bool(data) and not self._lcr & LCR_DLAB and not self._mcr & MCR_LOOP
            if plain:
                self._thre_pending = True
                self._update_irq()
        if plain:
            self._transmit(data)
        else:
            for value in data:
                self._write_data(value)

    def read_byte(self, offset: int) -> int:
        """BusDevice: read a register."""
        return self._readers[offset]()

    def write_byte(self, offset: int, value: int) -> None:
        """BusDevice: write a register."""
        self._writers[offset](value)

    def save(self) -> dict[str, object]:
        """Return the chip's state.  The line's level follows from the registers."""
        with self._lock:
            return {
                "fifo": bytes(self._fifo), "again": self._again, "ier": self._ier,
                "fcr": self._fcr, "lcr": self._lcr, "mcr": self._mcr, "scr": self._scr,
                "divisor": self._divisor, "thre_pending": self._thre_pending,
                "looks_missing": self._looks_missing,
            }

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError.  The line is not driven: see ``drive_line``."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("serial", data)
        fifo = fields.octets("fifo", 0, FIFO_SIZE)
        again = fields.octets("again", 0, FIFO_SIZE)
        ier, mcr = fields.integer("ier", 0, 0x0F), fields.integer("mcr", 0, 0x1F)
        fcr, lcr = fields.integer("fcr", 0, FCR_ENABLE), fields.integer("lcr", 0, 0xFF)
        scr, divisor = fields.integer("scr", 0, 0xFF), fields.integer("divisor", 0, 0xFFFF)
        thre_pending = fields.boolean("thre_pending")
        looks_missing = fields.integer("looks_missing", 0, POLLS)
        fields.end()
        with self._lock:
            self._fifo, self._again = deque(fifo), again
            self._ier, self._mcr, self._fcr, self._lcr = ier, mcr, fcr, lcr
            self._scr, self._divisor, self._thre_pending = scr, divisor, thre_pending
            self._looks_missing = looks_missing
            self._irq_level = self._line_level()

    def drive_line(self) -> None:
        """Tell ``set_irq`` the line's level again, because no saved chip of KVM's has it."""
        with self._lock:
            self._set_irq(self._irq_level)

    # Registers, in the order of their offsets.

    def _read_data(self) -> int:
        with self._lock:
            if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            value = self._fifo.popleft() if self._fifo else None
            if not self._fifo:
                self._refill()
            room = not self._fifo
            self._update_irq()
        if value is None:
            self._look()  # without a look at LSR
            return 0
        if room:
            self._on_room()
        return value

    def _write_data(self, value: int) -> None:
        with self._lock:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
                return
            self._thre_pending = True
            looped = self._mcr & MCR_LOOP
            if looped and len(self._fifo) < FIFO_SIZE:
                self._fifo.append(value)
            self._update_irq()
        # Outside the lock: a full console makes this wait, and must not stop receive().
        if not looped:
            self._transmit(value.to_bytes(1, "little"))

    def _read_ier(self) -> int:
        return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier

    def _write_ier(self, value: int) -> None:
        with self._lock:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
                return
            if value & ~self._ier & IER_THRE:
                self._thre_pending = True  # the holding register is empty already
            listens = value & ~self._ier & IER_RX
            if value & 0x0F != self._ier:
                self._set_up()
            self._ier = value & 0x0F
            self._refill()
            self._update_irq()
        if listens:
            self._on_room()

    def _read_iir(self) -> int:
        with self._lock:
            pending = self._pending()
            if pending == IIR_THRE:
                self._thre_pending = False  # reading IIR is what acknowledges THR empty
                self._update_irq()
            return pending | (IIR_FIFO_ON if self._fcr & FCR_ENABLE else 0)

    def _write_fcr(self, value: int) -> None:
        with self._lock:
            cleared = value & FCR_CLEAR_RX or (value ^ self._fcr) & FCR_ENABLE
            if cleared:
                self._set_up()
                self._clear_fifo()
            self._fcr = value & FCR_ENABLE
            self._refill()
            self._update_irq()
        if cleared:
            self._on_room()

    def _read_lcr(self) -> int:
        return self._lcr

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _read_mcr(self) -> int:
        return self._mcr

    def _write_mcr(self, value: int) -> None:
        with self._lock:
            reconnected = self._mcr & ~value & MCR_LOOP
            if (self._mcr ^ value) & MCR_LOOP:
                self._clear_fifo()  # looped and received bytes do not mix
                self._looks_missing = POLLS
            self._mcr = value & 0x1F
            self._refill()
            self._update_irq()
        if reconnected:
            self._on_room()

    def _read_lsr(self) -> int:
        if self._looks_missing:
            self._look()
        return LSR_IDLE | LSR_DATA_READY if self._fifo else LSR_IDLE

    def _read_msr(self) -> int:
        mcr = self._mcr
        if not mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD  # a cable that is always connected
        # In loopback the four outputs appear on the four inputs; Linux checks this to find a UART.
        loops = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(status for control, status in loops if mcr & control)

    def _write_read_only(self, value: int) -> None:
        """LSR and MSR: factory tests write them, drivers do not."""

    def _read_scr(self) -> int:
        return self._scr

    def _write_scr(self, value: int) -> None:
        self._scr = value

    def _listens(self) -> bool:
        """True if the driver wants bytes: connected to the line, and by interrupt or by polling."""
        return (bool(self._ier & IER_RX) or not self._looks_missing) and not self._mcr & MCR_LOOP

    def _look(self) -> None:
        """Count the guest's look for a byte; after enough of them it counts as polling."""
        with self._lock:
            if not self._looks_missing:
                return
            self._looks_missing -= 1
            if self._looks_missing or self._ier & IER_RX:
                return
            self._refill()
        self._on_room()

    def _set_up(self) -> None:
        """Note, with the lock held, that the driver sets the chip up: it must show anew that it
        polls."""
        polled = not self._looks_missing and not self._ier & IER_RX
        self._looks_missing = POLLS
        if polled and not self._mcr & MCR_LOOP:
            # The driver may read RBR to empty the FIFO: bytes that nobody waits for stay outside.
            self._clear_fifo()

    def _clear_fifo(self) -> None:
        if not self._mcr & MCR_LOOP:
            self._again = bytes(self._fifo) + self._again
        self._fifo.clear()

    def _refill(self) -> None:
        """Receive the bytes anew that were cleared unread."""
        if self._again and self._listens():
            room = FIFO_SIZE - len(self._fifo)
            self._fifo.extend(self._again[:room])
            self._again = self._again[room:]

    def _pending(self) -> int:
        """Return IIR's identification bits for the highest-priority enabled interrupt."""
        if self._ier & IER_RX and self._fifo:
            return IIR_RX
        if self._ier & IER_THRE and self._thre_pending:
            return IIR_THRE
        return IIR_NONE

    def _line_level(self) -> bool:
        # On a PC, OUT2 gates the UART's interrupt line; loopback disconnects it.
        connected = self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        return connected and self._pending() != IIR_NONE

    def _update_irq(self) -> None:
        level = self._line_level()
        if level != self._irq_level:
            self._irq_level = level
            self._set_irq(level)
