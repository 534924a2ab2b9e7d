"""The chips that every board has: ports that only answer, and those that end a run."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.board.board import Board
from pyvmm.config import RunConfig
from pyvmm.devices.boot_timer import BootTimer
from pyvmm.devices.debug_exit import DebugExit
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.pci_host import PciHost
from pyvmm.devices.power import Power
from pyvmm.devices.pvpanic import PvPanic
from pyvmm.devices.rtc import Rtc
from pyvmm.run.outcome import Kind
from pyvmm.run.verdict import Verdict
from pyvmm.x86 import layout


def add_ports(board: Board, config: RunConfig, timer: BootTimer) -> None:
    """Add the ports that only answer."""
    board.add_port("boot timer", layout.BOOT_TIMER_PORT, timer)
    board.add_port("PCI host bridge", layout.PCI_PORT, PciHost())
    if config.rtc == "utc":
        board.add_port("RTC", layout.RTC_INDEX, Rtc())


def add_endings(board: Board, verdict: Verdict, report: Callable[[str], None]) -> None:
    """Add the ports by which a guest ends the run, or says why it is about to."""
    def ends_in(kind: Kind) -> Callable[[], None]:
        return lambda: verdict.end(kind)

    board.add_part("verdict", verdict)
    keyboard = I8042(ends_in(Kind.RESET))
    board.add_part("i8042", keyboard)
    board.pio.add(layout.I8042_DATA, 1, keyboard.data_port)
    board.pio.add(layout.I8042_COMMAND, 1, keyboard.command_port)
    power = Power(
        s5_sleep_type=layout.S5_SLEEP_TYPE, reset_value=layout.RESET_VALUE,
        on_power_off=ends_in(Kind.POWER_OFF), on_reset=ends_in(Kind.RESET),
    )
    board.add_port("power", layout.SLEEP_CONTROL_PORT, power)
    board.add_port("pvpanic", layout.PVPANIC_PORT, PvPanic(
        verdict.panic_reported,
        lambda: report("the guest has panicked; its crash kernel takes over"),
    ))
    debug_exit = DebugExit(lambda byte: verdict.end(Kind.GUEST_STATUS, byte))
    board.add_port("debug exit", layout.DEBUG_EXIT_PORT, debug_exit)
