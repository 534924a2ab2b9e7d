"""The consoles of a machine: ``ttyS0`` always, and ``hvc0`` if the command line names it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence

from pyvmm.board.board import Board
from pyvmm.board.polled_uart import PolledUart
from pyvmm.board.slot import eventfd
from pyvmm.config import RunConfig
from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.console.watch import ConsoleWatch
from pyvmm.devices.serial import Serial
from pyvmm.errors import ConfigError
from pyvmm.kvm.handles import Vcpu, Vm
from pyvmm.run.io_loop import IoSource
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.x86 import layout

if TYPE_CHECKING:
    from pyvmm.board.hvc0 import Hvc0

THREAD = "console"
"""Serves both.  Not the main thread: that moves the bytes for which a console may wait."""


class Consoles:
    """Both consoles, which show on ``output`` and tell ``on_room`` that there is room for input.

    ``hvc0`` gets the board's next slot; ``add_serial_port`` adds ``ttyS0``, once there is a VM.
    That is ``uart``.  Then ``receive`` takes typed bytes for the one that is chosen and says how
    many it took.
    """

    receive: Callable[[bytes], int]
    uart: PolledUart

    def __init__(
        self, config: RunConfig, board: Board, console: Console, output: OutputBuffer,
        on_room: Callable[[], None],
    ) -> None:
        self._board = board
        self._on_room = on_room
        self._is_virtio = config.console_is_virtio
        self._hvc0: Hvc0 | None = None
        self._show_serial = output.write
        if config.has_virtio_console:
            from pyvmm.board.hvc0 import Hvc0

            self._hvc0 = hvc0 = Hvc0(
                output.write, on_room, terminal_size=lambda: console.size,
                is_chosen=config.console_is_virtio,
            )
            self._slot = board.plug(hvc0.device, THREAD, at_exit=True)
            board.add_part("hvc0", hvc0)
            self._show_serial = hvc0.show_serial

    def add_serial_port(
        self,
        vm: Vm,
        vcpus: Sequence[Vcpu],
        ring_page: int,
        watch: ConsoleWatch,
        stack: contextlib.ExitStack,
    ) -> None:
        """Add ``ttyS0``, for which KVM gathers bytes in the page ``ring_page`` of a lone vCPU.

        Of several vCPUs ``watch`` must know which one sent a byte, and KVM does not say.
        """
        ring = vcpus[0].coalesced_ring(ring_page) if len(vcpus) == 1 else None
        show = self._show_serial if len(vcpus) == 1 else watch.tap(self._show_serial)
        serial = Serial(show, functools.partial(vm.irq_line, layout.SERIAL_IRQ), self._on_room)
        polled_fd = eventfd(stack)
        self.uart = PolledUart(
            serial, ring=ring,
            gather=functools.partial(vm.gather_port, layout.SERIAL_PORT),
            begin=functools.partial(os.eventfd_write, polled_fd, 1),
        )
        self._board.pio.add(layout.SERIAL_PORT, Serial.LENGTH, self.uart)
        self._board.add_part("serial", self.uart)
        self._board.add_source(THREAD, IoSource(polled_fd, self.uart.tick))
        self.receive = serial.receive
        if self._hvc0 is not None and self._is_virtio:
            self.receive = self._hvc0.device.receive

    def terminal_changed(self) -> None:
        """The terminal may have another size: have ``hvc0`` look."""
        if self._hvc0 is not None:
            self._slot.refresh()

    def finish(self) -> None:
        """The guest has ended: show what was held back."""
        self.uart.flush()
        if self._hvc0 is not None:
            self._hvc0.finish()


def open_console(config: RunConfig) -> Console:
    """Return the console; ConfigError if it is a file that the run reads or serves."""
    files = [os.fspath(config.kernel)]
    for disk in config.disks:
        files += disk.files
    if config.initrd is not None:
        files.append(os.fspath(config.initrd))
    if config.console not in ("stdio", "none"):
        for path in files:
            with contextlib.suppress(OSError, ValueError):
                if os.path.samefile(config.console, path):
                    raise ConfigError(
                        f"--console {config.console}",
                        f"is {path}, which this run uses; name another file",
                    )
    return Console.open(config.console)
