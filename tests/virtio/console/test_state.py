"""``save`` and ``restore`` of the console: typed bytes, the size, and how long input is held."""

from __future__ import annotations

import pytest

from pyvmm.virtio.console.device import HOLD_S, MAX_HOLD_S
from pyvmm.virtio.spec import InterruptBit, Register
from tests.support.virtio_driver import RAM_BASE, VirtioDriver, readable, writable
from tests.support.virtio_states import assert_plain
from tests.virtio.console.test_device import RECEIVE, TRANSMIT, ConsoleRig


def moved(rig: ConsoleRig) -> ConsoleRig:
    """Another rig over the same RAM that goes on where ``rig`` was saved."""
    state, page, ram = rig.transport.save(), bytes(rig.transport.page), rig.memory.regions[0].view
    assert_plain(state)
    other = ConsoleRig()
    other.memory.regions[0].view[:] = ram
    other.now_s = rig.now_s + 3600  # no time of the host's is in a state
    other.size = (132, 50)
    assert other.device.refresh()
    other.transport.restore(state)
    assert other.transport.save() == state
    assert bytes(other.transport.page) == page
    assert bytes(other.memory.regions[0].view) == bytes(ram)
    assert other.irqs == []
    assert other.news == []
    for driver, old in ((other.rx, rig.rx), (other.tx, rig.tx)):
        for name in ("desc", "avail", "used", "avail_idx", "used_idx", "_top"):
            setattr(driver, name, getattr(old, name))
    return other


def buffer_for_input(driver: VirtioDriver) -> int:
    """Offer one of 16 bytes; its GPA."""
    gpa = driver.alloc(16)
    driver.submit([writable(gpa, 16)])
    return gpa


def test_typed_bytes_wait_for_the_driver_of_the_next_machine() -> None:
    rig = ConsoleRig()
    rig.start()
    assert rig.type(b"date\n") == 5
    other = moved(rig)
    assert other.rooms, "whoever types may go on"
    gpa = buffer_for_input(other.rx)
    assert other.rx.reap() == [(0, 5)]
    assert other.memory.read(gpa, 5) == b"date\n"
    assert other.shown == b""


def test_output_that_waits_is_shown_once() -> None:
    rig = ConsoleRig()
    rig.start()
    rig.tx.submit([readable(rig.tx.put(b"one"), 3)])
    rig.tx.place([readable(rig.tx.put(b"two"), 3)])
    assert rig.shown == b"one"
    other = moved(rig)
    assert other.transport.service(TRANSMIT) is None
    assert other.shown == b"two"


@pytest.mark.parametrize("sends", [False, True])
def test_input_is_held_for_as_long_as_it_would_have_been(sends: bool) -> None:
    rig = ConsoleRig()
    rig.start_driver()
    if sends:
        rig.tx.submit([readable(rig.tx.put(b"x"), 1)])
    assert rig.device.receive(b"y") == 1
    wait_s = HOLD_S if sends else MAX_HOLD_S
    rig.now_s += wait_s / 2
    other = moved(rig)
    buffer_for_input(other.rx)
    assert other.rx.reap() == []
    other.now_s += wait_s / 2
    assert other.transport.service(RECEIVE) is None
    assert other.rx.reap() == [(0, 1)]


def test_the_driver_is_told_of_a_terminal_of_another_size() -> None:
    rig = ConsoleRig()
    rig.start()
    assert rig.device.refresh(), "a driver that has just begun is told once"
    generation = rig.rx.reg(Register.CONFIG_GENERATION)
    other = moved(rig)
    assert other.device.refresh()
    assert not other.device.refresh()
    other.transport.config_changed()
    assert other.rx.reg(Register.CONFIG) == 132 | 50 << 16
    assert other.rx.reg(Register.CONFIG_GENERATION) == generation + 1
    assert other.rx.reg(Register.INTERRUPT_STATUS) == InterruptBit.CONFIG_CHANGE


def test_a_driver_that_was_not_told_of_its_terminal_is_told_by_the_next_machine() -> None:
    rig = ConsoleRig()
    rig.start()
    other = moved(rig)
    other.size = (80, 24)
    assert other.device.refresh()
    assert not other.device.refresh()


def test_a_console_that_no_driver_has_found_takes_no_input() -> None:
    other = moved(ConsoleRig())
    assert other.rooms == []
    assert other.type(b"x") == 0
    assert other.memory.read(RAM_BASE, 1) == b"\0"
