"""PolledUart: no byte lost, none out of order, none hidden for long; KVM's part is played here."""

from __future__ import annotations

import contextlib
import errno
import mmap
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.board.polled_uart import POLLED_BYTES, QUIET_TICKS, TICK_S, PolledUart
from pyvmm.devices import serial as uart
from pyvmm.devices.serial import Register, Serial
from pyvmm.errors import KvmError, StateError
from pyvmm.kvm.exits import RING_CAPACITY, CoalescedRing
from tests.support.patience import patient
from tests.support.states import spoilt


class Kvm:
    """The guest's accesses as KVM passes them on: gathered while it was asked to, else an exit."""

    def __init__(self, *, can_gather: bool = True, refuses: bool = False) -> None:
        self.page = bytearray(mmap.PAGESIZE)
        self.gathers = False
        self.refuses = refuses
        self.begun = self.exits = 0
        self.sent = bytearray()
        self.levels: list[bool] = []
        self.uart = PolledUart(
            Serial(self.sent.extend, self.levels.append),
            ring=CoalescedRing(memoryview(self.page)) if can_gather else None,
            gather=self._gather,
            begin=self._begin,
        )

    def _gather(self, on: bool) -> None:
        if self.refuses:
            raise KvmError("KVM_REGISTER_COALESCED_MMIO", errno.ENOSPC)
        assert on != self.gathers
        self.gathers = on

    def _begin(self) -> None:
        self.begun += 1

    def write(self, register: Register, value: int) -> None:
        first, last = struct.unpack_from("<II", self.page)
        if self.gathers and register == Register.DATA and (last + 1) % RING_CAPACITY != first:
            struct.pack_into("<QII8s", self.page, 8 + 24 * last, 0x3F8, 1, 1, bytes([value]))
            struct.pack_into("<I", self.page, 4, (last + 1) % RING_CAPACITY)
            return
        self.exits += 1
        self.uart.write(register, 1, value)

    def read(self, register: Register) -> int:
        self.exits += 1
        return self.uart.read(register, 1)

    def poll_out(self, text: bytes) -> None:
        for byte in text:
            assert self.read(Register.LSR) & uart.LSR_THRE
            self.write(Register.DATA, byte)

    def polls(self) -> Kvm:
        """This, after a driver has been seen to poll."""
        self.poll_out(bytes(POLLED_BYTES))
        assert self.gathers
        self.sent.clear()
        return self


def test_a_polling_driver_makes_one_exit_a_byte() -> None:
    kvm = Kvm().polls()
    before = kvm.exits
    text = bytes(range(256)) * 8
    kvm.poll_out(text)
    assert kvm.exits - before == len(text)
    kvm.read(Register.LSR)
    assert kvm.sent == text


def test_a_driver_that_fills_the_fifo_makes_one_exit_for_all_of_it() -> None:
    kvm = Kvm().polls()
    before = kvm.exits
    for _ in range(10):
        kvm.read(Register.LSR)
        for byte in b"sixteen bytes...":
            kvm.write(Register.DATA, byte)
    assert kvm.exits - before == 10
    kvm.uart.flush()
    assert kvm.sent == b"sixteen bytes..." * 10


def test_a_driver_that_does_not_look_makes_an_exit_a_byte() -> None:
    kvm = Kvm()
    for byte in bytes(10 * POLLED_BYTES):
        kvm.write(Register.DATA, byte)
    assert (kvm.begun, kvm.exits, len(kvm.sent)) == (0, 10 * POLLED_BYTES, 10 * POLLED_BYTES)


def test_one_that_looks_now_and_then_neither() -> None:
    kvm = Kvm()
    for _ in range(100):
        kvm.read(Register.LSR)
        for byte in bytes(17):
            kvm.write(Register.DATA, byte)
    assert not kvm.gathers


def test_what_is_sent_and_not_looked_after_comes_with_the_next_tick() -> None:
    kvm = Kvm().polls()
    for byte in b"login: ":
        kvm.write(Register.DATA, byte)
    assert kvm.begun == 1
    assert kvm.sent == b""
    assert kvm.uart.tick() == TICK_S
    assert kvm.sent == b"login: "


def test_a_quiet_uart_is_back_to_an_exit_a_byte() -> None:
    kvm = Kvm().polls()
    assert [kvm.uart.tick() for _ in range(QUIET_TICKS + 1)] == [TICK_S] * QUIET_TICKS + [None]
    assert kvm.uart.tick() is None
    kvm.write(Register.DATA, ord("!"))
    assert kvm.sent == b"!"
    kvm.poll_out(bytes(POLLED_BYTES))
    assert kvm.begun == 2


def test_one_that_is_used_is_not() -> None:
    kvm = Kvm().polls()
    for _ in range(5 * QUIET_TICKS):
        assert kvm.uart.tick() == TICK_S
        kvm.read(Register.LSR)


def test_bytes_that_came_while_kvm_was_told_to_stop_are_sent() -> None:
    kvm = Kvm().polls()
    stop = kvm._gather

    def slowly(on: bool) -> None:
        kvm.write(Register.DATA, ord("x"))
        stop(on)
        # Made an exit already, while the ioctl waits for a grace period.
        later.append(threads.submit(kvm.uart.write, Register.DATA, 1, ord("y")))

    later: list[Future[None]] = []
    kvm.uart._gather = slowly
    with ThreadPoolExecutor(1) as threads:
        while kvm.uart.tick() is not None:
            pass
        later[0].result()
    assert kvm.sent == b"xy"


@pytest.mark.parametrize("kvm", [Kvm(can_gather=False), Kvm(refuses=True)], ids=["old", "refuses"])
def test_a_kvm_that_cannot(kvm: Kvm) -> None:
    text = b"abc" * POLLED_BYTES
    kvm.poll_out(text)
    assert (bytes(kvm.sent), kvm.begun, kvm.exits) == (text, 0, 2 * len(text))
    kvm.uart.flush()
    assert kvm.uart.tick() is None


def test_a_driver_that_waits_for_the_transmitters_interrupt_waits_for_nothing_else() -> None:
    kvm = Kvm().polls()
    kvm.write(Register.DATA, ord("a"))
    kvm.write(Register.IER, uart.IER_THRE)
    assert kvm.read(Register.IIR_FCR) & 0x0F == uart.IIR_THRE
    assert kvm.levels[-1:] == [False]
    for _ in range(16):
        kvm.write(Register.DATA, ord("b"))
    assert kvm.levels[-1:] == [True], "at once, not with a tick"
    kvm.poll_out(bytes(2 * POLLED_BYTES))
    assert kvm.begun == 1, "nor while it polls in between"
    kvm.write(Register.IER, 0)
    kvm.poll_out(bytes(POLLED_BYTES))
    assert kvm.begun == 2


def test_a_tick_and_the_guest_do_not_overtake_each_other() -> None:
    """The tick has taken the bytes and not sent them yet, when the guest goes on."""
    kvm = Kvm().polls()
    for byte in b"hello":
        kvm.write(Register.DATA, byte)
    serial, taken, go_on = kvm.uart._uart, threading.Event(), threading.Event()
    send = serial.send

    def slowly(data: bytes) -> None:
        taken.set()
        go_on.wait(patient(10))
        send(data)

    serial.send = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as threads:
        tick = threads.submit(kvm.uart.tick)
        assert taken.wait(patient(10))
        serial.send = send  # type: ignore[method-assign]
        guest = threads.submit(kvm.write, Register.LCR, uart.LCR_DLAB)
        go_on.set()
        tick.result()
        guest.result()
    assert kvm.sent == b"hello"


def test_the_divisor_and_loopback_are_not_sent() -> None:
    kvm = Kvm().polls()
    kvm.write(Register.LCR, uart.LCR_DLAB | 3)
    kvm.write(Register.DATA, 0x55)
    kvm.write(Register.LCR, 3)
    kvm.write(Register.MCR, uart.MCR_LOOP)
    kvm.write(Register.DATA, ord("l"))
    assert kvm.read(Register.DATA) == ord("l")
    kvm.write(Register.MCR, uart.MCR_OUT2)
    kvm.write(Register.LCR, uart.LCR_DLAB | 3)
    assert kvm.read(Register.DATA) == 0x55
    assert kvm.sent == b""


STEPS = st.lists(
    st.tuples(st.sampled_from(["poll", "fill", "raw", "tick", "lcr", "ier", "mcr"]),
              st.integers(0, 255)),
    max_size=40,
)


def _do(kvm: Kvm, steps: list[tuple[str, int]]) -> None:
    for step, value in steps:
        match step:
            case "poll":
                kvm.poll_out(bytes([value]) * 40)
            case "fill":
                kvm.read(Register.LSR)
                for _ in range(16):
                    kvm.write(Register.DATA, value)
            case "raw":
                for _ in range(value):
                    kvm.write(Register.DATA, value)
            case "tick":
                kvm.uart.tick()
            case "lcr":
                kvm.write(Register.LCR, value)
            case "ier":
                kvm.write(Register.IER, value)
            case _:
                kvm.write(Register.MCR, value)


@given(STEPS)
def test_the_host_sees_what_it_would_without(steps: list[tuple[str, int]]) -> None:
    gathered, plain = Kvm(), Kvm(can_gather=False)
    _do(gathered, steps)
    _do(plain, steps)
    gathered.uart.flush()
    assert gathered.sent == plain.sent
    registers = (Register.IER, Register.LCR, Register.MCR, Register.LSR, Register.IIR_FCR)
    assert list(_read(gathered, registers)) == list(_read(plain, registers))


def _read(kvm: Kvm, registers: tuple[Register, ...]) -> Iterator[int]:
    for register in registers:
        yield kvm.read(register)


@given(st.binary(min_size=8, max_size=8))
def test_no_index_in_the_ring_leads_out_of_it(indices: bytes) -> None:
    page = bytearray(mmap.PAGESIZE)
    page[:8] = indices
    first, _ = struct.unpack("<II", indices)
    ring = CoalescedRing(memoryview(page))
    if first < RING_CAPACITY:  # ours; only `last` is KVM's
        assert len(ring.take()) <= RING_CAPACITY


def test_what_kvm_has_gathered_is_sent_before_the_state_is_saved() -> None:
    kvm, copy = Kvm().polls(), Kvm()
    for byte in b"last words":
        kvm.write(Register.DATA, byte)
    kvm.uart.write(Register.SCR, 1, 0xA5)
    state = kvm.uart.save()
    assert kvm.sent == b"last words"
    copy.uart.restore(state)
    assert not copy.sent
    assert not copy.levels
    assert copy.uart.save() == state
    assert copy.read(Register.SCR) == 0xA5
    copy.polls()
    copy.poll_out(b"more")
    copy.uart.flush()
    assert copy.sent == b"more"


@given(STEPS, st.data())
def test_no_junk_is_taken_for_a_state(steps: list[tuple[str, int]], data: st.DataObject) -> None:
    kvm, copy = Kvm(), Kvm()
    _do(kvm, steps)
    with contextlib.suppress(StateError):
        copy.uart.restore(data.draw(spoilt(kvm.uart.save())))
    _do(copy, steps)


def test_a_uart_that_is_watched_gathers_no_more() -> None:
    kvm = Kvm().polls()
    kvm.write(Register.DATA, 0x21)
    kvm.uart.stop_gathering()
    assert not kvm.gathers
    assert kvm.sent.endswith(b"!"), "what was gathered is not lost"
    kvm.poll_out(bytes(3 * POLLED_BYTES))
    assert not kvm.gathers


def test_who_watches_a_uart_does_not_wait_for_its_user() -> None:
    """Its user may wait for a full console, and the watcher may be the one who empties it."""
    kvm = Kvm().polls()
    with kvm.uart._lock:
        kvm.uart.stop_gathering()
        still_gathers = kvm.gathers
    assert still_gathers
    assert kvm.uart.tick() is None
    assert not kvm.gathers
    kvm.poll_out(bytes(3 * POLLED_BYTES))
    assert not kvm.gathers
