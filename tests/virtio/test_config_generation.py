"""Reading a configuration space that changes (2.5.1 "Driver Requirements: Device Configuration
Space"): a driver that reads the generation, the fields, and the generation again is never fooled.

The guest reads a mapped page whenever it likes, so what counts is every state that the page has
while a change is made.  They are collected at each line of the device model's code, and then a
driver's four reads are put between them in every order that time allows.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.virtio.console.device import ConsoleDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Feature, InterruptBit, Register, Status
from tests.support.virtio_driver import RAM_BASE, VirtioDriver

OLD, NEW, NEWER = (80, 24), (132, 43), (200, 60)
State = tuple[int, int, int]
"""Generation, columns, rows."""


class Rig:
    """A console whose page is looked at while its code runs."""

    def __init__(self) -> None:
        self.irqs: list[int] = []
        memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
        self.size = OLD
        self.device = ConsoleDevice(lambda _data: None, lambda: None, size=lambda: self.size)
        self.transport = MmioTransport(
            self.device, memory, lambda: self.irqs.append(1), report=print, keep_used=True
        )
        self.driver = VirtioDriver(self.transport, memory)
        self.page = memoryview(self.transport.page)
        self.states: list[State] = []

    def resize(self, size: tuple[int, int]) -> None:
        self.size = size
        assert self.device.refresh()

    def look(self) -> None:
        """Note what a guest would read now."""
        word = Register.CONFIG_GENERATION
        generation, columns, rows = (
            int.from_bytes(self.page[offset : offset + length], "little")
            for offset, length in ((word, 4), (Register.CONFIG, 2), (Register.CONFIG + 2, 2))
        )
        if not self.states or self.states[-1] != (generation, columns, rows):
            self.states.append((generation, columns, rows))

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at every line of ours that runs meanwhile."""
        def trace(frame: FrameType, _event: str, _arg: object) -> Any:
            if "/pyvmm/" not in frame.f_code.co_filename:
                return None
            self.look()
            return trace

        self.look()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)
        self.look()

    def emergency_write(self) -> None:
        self.transport.write(Register.CONFIG + 8, 4, ord("!"))

    def reset(self) -> None:
        self.transport.write(Register.STATUS, 4, 0)

    def negotiate(self) -> None:
        assert self.driver.negotiate()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.page.release()
    rig.transport.close()


def accepted(states: list[State]) -> set[tuple[int, int]]:
    """Every ``(columns, rows)`` that a driver may take for the device's."""
    order = itertools.combinations_with_replacement(states, 4)
    return {
        (second[1], third[2]) for first, second, third, last in order if first[0] == last[0]
    }


def test_the_collector_would_find_a_torn_pair() -> None:
    assert accepted([(0, 80, 24), (1, 80, 24), (1, 132, 43), (2, 132, 43)]) == {
        OLD, NEW, (80, 43)
    }


@pytest.mark.parametrize("events", [
    [], [Rig.emergency_write], [Rig.reset, Rig.negotiate], [Rig.negotiate, Rig.emergency_write],
], ids=lambda events: "+".join(event.__name__ for event in events) or "nothing")
def test_no_driver_takes_a_torn_size_for_the_terminals(
    rig: Rig, events: list[Callable[[Rig], None]]
) -> None:
    """Also where the guest has the configuration shown anew before the device says it changed."""
    with rig.looking():
        for size in (NEW, NEWER):
            rig.resize(size)
            for event in events:
                event(rig)
            rig.transport.config_changed()
    assert rig.states[-1][1:] == NEWER
    assert accepted(rig.states) == {OLD, NEW, NEWER}
    generations = [generation for generation, _, _ in rig.states]
    assert len(set(generations)) == len(rig.states), "each state has a generation of its own"


def test_what_else_the_page_says_survives_a_change(rig: Rig) -> None:
    rig.negotiate()
    rig.driver.setup_queue()
    rig.driver.set(Register.STATUS, 15)
    before = bytes(rig.page)
    rig.resize(NEW)
    rig.transport.config_changed()
    assert rig.irqs == [1]
    assert rig.driver.reg(Register.INTERRUPT_STATUS) == (
        InterruptBit.CONFIG_CHANGE | InterruptBit.USED_BUFFER
    )
    rig.driver.set(Register.INTERRUPT_ACK, InterruptBit.CONFIG_CHANGE)
    changed = {at & ~3 for at, (old, new) in enumerate(zip(before, rig.page, strict=True))
               if old != new}
    assert changed == {Register.CONFIG_GENERATION, Register.CONFIG}
    assert rig.driver.reg(Register.STATUS) == Status.DRIVER_OK | 11
    assert rig.driver.offered & Feature.VERSION_1
    rig.reset()
    assert rig.driver.reg(Register.STATUS) == 0, "the page is still the one that is written to"


def test_a_change_that_changes_nothing_is_told_all_the_same(rig: Rig) -> None:
    """Linux reads the size only when told of a change, so it is told once at the start."""
    rig.negotiate()
    rig.driver.setup_queue()
    rig.driver.set(Register.STATUS, 15)
    rig.transport.config_changed()
    assert rig.irqs == [1]


def test_the_generation_wraps(rig: Rig) -> None:
    rig.page.cast("I")[Register.CONFIG_GENERATION // 4] = 0xFFFF_FFFF
    rig.resize(NEW)
    rig.transport.config_changed()
    assert rig.driver.reg(Register.CONFIG_GENERATION) == 0


def test_a_host_that_refuses_a_new_page_shows_the_change_all_the_same(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_page: object, _content: bytes) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("pyvmm.virtio.register_page.replace_page", refuse)
    rig.resize(NEW)
    with rig.looking():
        rig.transport.config_changed()
    assert rig.states[-1][1:] == NEW
    assert rig.states[-1][0] != rig.states[0][0]
