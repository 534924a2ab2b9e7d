"""The state of a board without KVM: every part is found by its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from pyvmm.board.board import Board
from pyvmm.board.hvc0 import Hvc0
from pyvmm.devices.rtc import Rtc
from pyvmm.errors import StateError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.spec import Register
from pyvmm.x86 import layout
from tests.support.virtio_driver import VirtioDriver, readable
from tests.support.virtio_states import assert_plain, replaced, without

RAM_BYTES = 8 << 20
DRIVER_RAM = 4 << 20
TRANSMIT = 1


class Rig:
    """A board with a clock, hvc0 and, last, a source of entropy."""

    def __init__(self, stack: contextlib.ExitStack, *, entropy: str = "entropy") -> None:
        self.memory = stack.enter_context(GuestMemory([(0, RAM_BYTES)]))
        self.board = Board(self.memory, stack, maps_pages=True, report=print)
        self.shown = bytearray()
        self.hvc0 = Hvc0(
            self.shown.extend, lambda: None, terminal_size=lambda: (80, 24), is_chosen=True
        )
        self.board.plug(self.hvc0.device, "console", at_exit=True)
        self.board.add_part("hvc0", self.hvc0)
        self.board.add_port("RTC", layout.RTC_INDEX, Rtc())
        self.board.plug(EntropyDevice(), entropy, at_exit=True)

    def say(self, text: bytes) -> None:
        """Start hvc0's driver, and have it say ``text``."""
        driver = VirtioDriver(
            self.board.slots[0].transport, self.memory, index=TRANSMIT, bottom=DRIVER_RAM
        )
        driver.restart()
        assert driver.negotiate()
        driver.setup_queue()
        driver.set(Register.STATUS, 15)
        driver.submit([readable(driver.put(text), len(text))])
        driver.reap()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_a_board_takes_the_state_of_another(stack: contextlib.ExitStack) -> None:
    first, second = Rig(stack), Rig(stack)
    first.board.pio.write(layout.RTC_INDEX, 1, 0x0B)
    first.say(b"up\n")
    state = first.board.save()
    assert_plain(state)
    assert state["parts"] != second.board.save()["parts"]
    second.memory.write(0, first.memory.read(0, RAM_BYTES))
    second.board.restore(state)
    restored = second.board.save()
    for one in (state, restored):  # the only thing that goes on
        one["slots"]["console"]["transport"]["device"]["input_held_ms"] = 0  # type: ignore[index]
    assert restored == state
    second.hvc0.show_serial(b"not shown: hvc0 has spoken, on the other board")
    assert second.shown == b""


def test_names_that_do_not_fit_are_a_state_error(stack: contextlib.ExitStack) -> None:
    state = Rig(stack).board.save()
    board = Rig(stack, entropy="chance").board
    with pytest.raises(StateError, match=r"^slots: chance is missing$"):
        board.restore(state)
    entropy = state["slots"]["entropy"]  # type: ignore[index]
    with pytest.raises(StateError, match=r"^slots: has no field 'entropy'$"):
        board.restore(replaced(state, ("slots", "chance"), entropy))
    with pytest.raises(StateError, match=r"^parts: RTC is missing$"):
        Rig(stack).board.restore(without(state, ("parts", "RTC")))
    with pytest.raises(StateError, match=r"^board: slots is missing$"):
        Rig(stack).board.restore(without(state, ("slots",)))


@pytest.mark.parametrize(("name", "value"), [("base", layout.VIRTIO_MMIO), ("gsi", 5)])
def test_a_device_in_another_place_is_a_state_error(
    stack: contextlib.ExitStack, name: str, value: int
) -> None:
    """The guest knows where its devices are, and they do not move."""
    rig = Rig(stack)
    state = replaced(rig.board.save(), ("slots", "entropy", name), value)
    with pytest.raises(StateError, match=rf"^slot entropy: {name} is not 0x.*another place$"):
        rig.board.restore(state)


def test_two_parts_of_one_name_or_place_are_refused(stack: contextlib.ExitStack) -> None:
    board = Rig(stack).board
    with pytest.raises(ValueError, match="two parts are named 'RTC'"):
        board.add_port("RTC", layout.PCI_PORT, Rtc())
    with pytest.raises(ValueError, match="is taken by a Rtc"):
        board.add_port("another RTC", layout.RTC_INDEX, Rtc())
