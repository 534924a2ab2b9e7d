"""The virtio console of a machine, and how it shares one terminal with the serial port.

One terminal shows one console: of two logins on it only one would hear what is typed.  The console
that gets the input is chosen (``RunConfig.console_is_virtio``).  If that is the virtio console, the
serial port is shown until the driver of the other has something to say: it has what
``earlyprintk=ttyS0`` says, for Linux's hvc driver does not repeat what was said before it came.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from pyvmm.slot import eventfd
from pyvmm.virtio.console import ConsoleDevice


class Hvc0:
    """``device``, of which ``typed_fd`` and ``resized_fd`` bring news: eventfds of ``stack``.

    ``show`` shows bytes on the terminal, of ``size``; ``on_room`` is called when there is room for
    typed bytes again.  A device that is not ``is_chosen`` shows nothing.
    """

    def __init__(
        self,
        show: Callable[[bytes], None],
        on_room: Callable[[], None],
        stack: contextlib.ExitStack,
        *,
        size: tuple[int, int],
        is_chosen: bool,
    ) -> None:
        self.typed_fd = eventfd(stack)
        self.resized_fd = eventfd(stack)
        self._show = show
        self._is_chosen = is_chosen
        self._is_shown = False
        self.device = ConsoleDevice(
            self._show_own, on_room, size=size, on_ready=self._tell, on_reset=self._hide
        )

    def show_serial(self, data: bytes) -> None:
        """Show what the serial port sends, unless the virtio console is shown."""
        if not self._is_shown:
            self._show(data)

    def receive(self, typed: bytes) -> int:
        """Take typed bytes: how many."""
        taken = self.device.receive(typed)
        os.eventfd_write(self.typed_fd, 1)
        return taken

    def resize(self, size: tuple[int, int]) -> None:
        """The terminal has ``size`` now: the driver is told if that is news."""
        if self.device.resize(size):
            os.eventfd_write(self.resized_fd, 1)

    def _show_own(self, data: bytes) -> None:
        if self._is_chosen:
            self._is_shown = True
            self._show(data)

    def _hide(self) -> None:
        """Its driver is gone: what comes next, a crash kernel, may only have the serial port."""
        self._is_shown = False

    def _tell(self) -> None:
        """A driver runs: it learns the size, and gets what its predecessor has not read."""
        os.eventfd_write(self.resized_fd, 1)
        os.eventfd_write(self.typed_fd, 1)
