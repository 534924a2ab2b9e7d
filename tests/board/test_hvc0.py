"""Fault 34: two consoles of a guest share one terminal, and show one at a time."""

from __future__ import annotations

import pytest

from pyvmm.board.hvc0 import MAX_HELD_BYTES, SILENCE_S, Hvc0
from pyvmm.memory import GuestMemory
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Register
from tests.support.virtio_driver import RAM_BASE, VirtioDriver, readable

TRANSMIT = 1


class Rig:
    """A terminal, the serial port's output and a driver for the other console's."""

    def __init__(self, *, is_chosen: bool) -> None:
        self.shown = bytearray()
        self.hvc0 = Hvc0(
            self.shown.extend, lambda: None, terminal_size=lambda: (80, 24), is_chosen=is_chosen
        )
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


def test_fault_34_the_serial_port_is_shown_until_the_virtio_console_speaks() -> None:
    rig = Rig(is_chosen=True)
    rig.hvc0.show_serial(b"early\n")
    rig.start()
    rig.hvc0.show_serial(b"still early\n")
    rig.say(b"up\n")
    rig.hvc0.show_serial(b"ttyS0 login: ")
    rig.say(b"hvc0 login: ")
    assert rig.shown == b"early\nstill early\nup\nhvc0 login: "


def test_fault_34_and_again_when_its_driver_is_gone() -> None:
    rig = Rig(is_chosen=True)
    rig.start()
    rig.say(b"one ")
    rig.driver.set(Register.STATUS, 0)
    rig.hvc0.show_serial(b"crash kernel ")
    rig.start()
    rig.say(b"two ")
    rig.hvc0.show_serial(b"hidden")
    assert rig.shown == b"one crash kernel two "


def test_fault_34_a_virtio_console_that_is_not_chosen_shows_nothing() -> None:
    rig = Rig(is_chosen=False)
    rig.start()
    rig.say(b"hvc0 login: ")
    rig.transport.write(Register.CONFIG + 8, 4, ord("!"))  # emergency write
    rig.hvc0.show_serial(b"ttyS0 login: ")
    rig.say(b"more")
    rig.hvc0.finish()
    assert rig.shown == b"ttyS0 login: "


def test_but_it_does_if_the_kernel_has_no_driver_for_the_serial_port(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr("pyvmm.board.hvc0.time.monotonic", lambda: now_s)
    rig = Rig(is_chosen=False)
    rig.start()
    rig.say(b"one ")
    now_s += SILENCE_S - 1
    rig.say(b"two ")
    assert rig.shown == b""
    now_s += 2
    rig.say(b"three ")
    rig.say(b"four")
    assert rig.shown == b"one two three four"


def test_at_the_end_of_a_short_run_too_and_what_is_held_is_bounded() -> None:
    rig = Rig(is_chosen=False)
    rig.start()
    for _ in range(40):
        rig.say(b"x" * 4096)
    rig.say(b"end")
    rig.hvc0.finish()
    rig.hvc0.finish()
    assert len(rig.shown) == MAX_HELD_BYTES
    assert rig.shown.endswith(b"xend")
