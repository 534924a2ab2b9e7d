"""Fault 34: two consoles of a guest share one terminal, and show one at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from pyvmm.board.hvc0 import MAX_HELD_BYTES, SILENCE_S, Hvc0
from pyvmm.memory import GuestMemory
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Register
from tests.support.virtio_driver import RAM_BASE, VirtioDriver, readable

TRANSMIT = 1


class Rig:
    """A terminal, the serial port's output and a driver for the other console's."""

    def __init__(self, stack: contextlib.ExitStack, *, is_chosen: bool) -> None:
        self.shown = bytearray()
        self.size = (80, 24)
        self.hvc0 = Hvc0(self.shown.extend, lambda: None, stack,
                         terminal_size=lambda: self.size, is_chosen=is_chosen)
        self.memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
        self.transport = MmioTransport(self.hvc0.device, self.memory, lambda: None, report=print)
        self.driver = VirtioDriver(self.transport, self.memory, index=TRANSMIT)

    def start(self) -> None:
        self.driver.restart()
        assert self.driver.negotiate()
        self.driver.setup_queue()
        self.driver.set(Register.STATUS, 15)

    def say(self, text: bytes) -> None:
        self.driver.submit([readable(self.driver.put(text), len(text))])
        self.driver.reap()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_fault_34_the_serial_port_is_shown_until_the_virtio_console_speaks(
    stack: contextlib.ExitStack,
) -> None:
    rig = Rig(stack, is_chosen=True)
    rig.hvc0.show_serial(b"early\n")
    rig.start()
    rig.hvc0.show_serial(b"still early\n")
    rig.say(b"up\n")
    rig.hvc0.show_serial(b"ttyS0 login: ")
    rig.say(b"hvc0 login: ")
    assert rig.shown == b"early\nstill early\nup\nhvc0 login: "


def test_fault_34_and_again_when_its_driver_is_gone(stack: contextlib.ExitStack) -> None:
    rig = Rig(stack, is_chosen=True)
    rig.start()
    rig.say(b"one ")
    rig.driver.set(Register.STATUS, 0)
    rig.hvc0.show_serial(b"crash kernel ")
    rig.start()
    rig.say(b"two ")
    rig.hvc0.show_serial(b"hidden")
    assert rig.shown == b"one crash kernel two "


def test_fault_34_a_virtio_console_that_is_not_chosen_shows_nothing(
    stack: contextlib.ExitStack,
) -> None:
    rig = Rig(stack, is_chosen=False)
    rig.start()
    rig.say(b"hvc0 login: ")
    rig.transport.write(Register.CONFIG + 8, 4, ord("!"))  # emergency write
    rig.hvc0.show_serial(b"ttyS0 login: ")
    rig.say(b"more")
    rig.hvc0.finish()
    assert rig.shown == b"ttyS0 login: "


def test_but_it_does_if_the_kernel_has_no_driver_for_the_serial_port(
    stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr("pyvmm.board.hvc0.time.monotonic", lambda: now_s)
    rig = Rig(stack, is_chosen=False)
    rig.start()
    rig.say(b"one ")
    now_s += SILENCE_S - 1
    rig.say(b"two ")
    assert rig.shown == b""
    now_s += 2
    rig.say(b"three ")
    rig.say(b"four")
    assert rig.shown == b"one two three four"


def test_at_the_end_of_a_short_run_too_and_what_is_held_is_bounded(
    stack: contextlib.ExitStack,
) -> None:
    rig = Rig(stack, is_chosen=False)
    rig.start()
    for _ in range(40):
        rig.say(b"x" * 4096)
    rig.say(b"end")
    rig.hvc0.finish()
    rig.hvc0.finish()
    assert len(rig.shown) == MAX_HELD_BYTES
    assert rig.shown.endswith(b"xend")


def test_a_driver_that_starts_is_told_of_the_size_and_of_what_waits(
    stack: contextlib.ExitStack,
) -> None:
    rig = Rig(stack, is_chosen=True)
    rig.hvc0.resize()
    for fd in (rig.hvc0.typed_fd, rig.hvc0.resized_fd):
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    rig.start()
    assert os.eventfd_read(rig.hvc0.typed_fd) == 1
    assert os.eventfd_read(rig.hvc0.resized_fd) == 1
    rig.size = (132, 43)
    rig.hvc0.resize()
    assert os.eventfd_read(rig.hvc0.resized_fd) == 1
    assert rig.hvc0.receive(b"typed") == 5
    assert os.eventfd_read(rig.hvc0.typed_fd) == 1
